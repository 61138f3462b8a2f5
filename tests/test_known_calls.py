"""A call that was planned before is planned as if it were the first: whatever changes is seen at the next call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from slicemod import functional as module
from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.retry import SmallerSlicesWarning
from slicemod.kernels.table_in_use import NO_TABLE, using_table
from slicemod.known_calls import KNOWN_CALLS, KnownCalls
from slicemod.memory.free_memory import PROBES, MemoryProbe
from slicemod.plan import NotEnoughMemoryError, SlicePlan
from tests.oracle import Inputs, layer_inputs, layer_like

needs_native = pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")


@pytest.fixture(autouse=True)
def known() -> KnownCalls:
    """The calls that are known: none at first."""
    KNOWN_CALLS.clear()
    return KNOWN_CALLS


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plan_of(inputs: Inputs, **more: Any) -> SlicePlan:
    plan = planned_attention(inputs.query, inputs.key, inputs.value, inputs.mask, **inputs.settings, **more)[1]
    assert plan is not None
    return plan


SMALL: dict[str, Any] = {"queries": 61, "keys": 53}  # PyTorch's kernel is the faster one
LARGE: dict[str, Any] = {"queries": 521, "keys": 521, "width": 40}  # the native one is


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_call_is_checked_and_planned_once(
    sizes: dict[str, Any], masked: bool, training: bool, monkeypatch: pytest.MonkeyPatch, known: KnownCalls
) -> None:
    inputs = layer_inputs(**sizes)
    inputs = inputs.leaves() if training else inputs
    mask = torch.rand(1, 3, 1, inputs.key.shape[2]) > 0.3 if masked else None
    first, plan = planned_attention(inputs.query, inputs.key, inputs.value, mask)
    assert len(known) == 1

    def refuse(*_: Any) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(module, "check_inputs", refuse)
    second, same_plan = planned_attention(inputs.query, inputs.key, inputs.value, mask)
    assert same_plan is plan
    assert torch.equal(first, second)
    assert second.requires_grad is training


@pytest.mark.parametrize("budget", ["auto", 0.5])
def test_a_changed_probe_is_seen_at_the_next_call(budget: Any, free_bytes: list[int]) -> None:
    inputs, slicing = layer_inputs(**LARGE), SliceConfig(budget=budget, policy="exact")
    ample = plan_of(inputs, slicing=slicing)
    assert ample.kernel != "math"
    free_bytes.append(ample.peak_bytes - 1)
    tight = plan_of(inputs, slicing=slicing)
    assert tight.peak_bytes < ample.peak_bytes
    free_bytes.append(2 * ample.peak_bytes)
    assert plan_of(inputs, slicing=slicing) == ample


def test_a_probe_whose_answers_do_not_last_is_asked_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def read(device: torch.device) -> int:
        asked.append(device)
        return 2**30

    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(read))
    inputs = layer_inputs()
    for count in (1, 2, 3):
        inputs.run(sliced_attention)
        assert len(asked) == count


def test_a_budget_that_no_plan_keeps_is_an_error_at_every_call(free_bytes: list[int]) -> None:
    inputs, slicing = layer_inputs(), SliceConfig(budget=0.5, kernel="fused")
    plan_of(inputs, slicing=slicing)
    free_bytes.append(100)
    for _ in range(2):
        with pytest.raises(NotEnoughMemoryError, match="has 50 bytes"):
            plan_of(inputs, slicing=slicing)


def test_a_budget_of_one_byte_is_not_one_of_all_there_is() -> None:
    inputs = layer_inputs()
    plan_of(inputs, slicing=SliceConfig(budget=1.0, kernel="fused"))
    with pytest.raises(NotEnoughMemoryError, match="has 1 bytes"):
        plan_of(inputs, slicing=SliceConfig(budget=1, kernel="fused"))


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_a_plan_follows_the_thread_count(sizes: dict[str, Any], threads: None) -> None:
    inputs = layer_inputs(**sizes)
    peaks = []
    for count in (1, 3, 1):
        torch.set_num_threads(count)
        peaks.append(plan_of(inputs).peak_bytes)
    assert peaks[0] == peaks[2] < peaks[1]


@pytest.mark.parametrize("kernel", ["auto", "native", "fused", "math"])
@pytest.mark.parametrize("sizes", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"])
def test_what_is_known_of_a_call_does_not_keep_its_tensors_alive(sizes: dict[str, Any], kernel: str) -> None:
    if kernel == "native" and native_library() is None:
        pytest.skip(f"no native kernel: {native_obstacle()}")
    inputs = layer_inputs(**sizes, mask=torch.rand(sizes["queries"], sizes["keys"])[None, None])
    inputs.run(sliced_attention, slicing={"kernel": kernel})
    tensors = inputs.query, inputs.key, inputs.value, inputs.mask
    watched = [weakref.ref(tensor) for tensor in tensors if tensor is not None]
    del inputs, tensors
    gc.collect()
    assert [tensor() for tensor in watched] == [None] * 4


def test_autocast_is_seen_at_the_next_call() -> None:
    inputs = layer_inputs()
    assert inputs.run(sliced_attention).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert inputs.run(sliced_attention).dtype == dtype
    assert inputs.run(sliced_attention).dtype == torch.float32


def test_whether_gradients_are_wanted_is_seen_at_the_next_call() -> None:
    inputs = layer_inputs(**LARGE)
    leaves = inputs.leaves()
    with torch.no_grad():
        inference = plan_of(leaves)
    training = plan_of(leaves)
    assert inference.peak_bytes < training.peak_bytes
    assert plan_of(inputs) == inference
    with torch.inference_mode():
        assert not leaves.run(sliced_attention).requires_grad
    assert leaves.run(sliced_attention).requires_grad


def test_settings_are_seen_at_the_next_call() -> None:
    inputs = layer_inputs()
    assert plan_of(inputs).kernel == "fused"
    assert plan_of(inputs, slicing={"kernel": "math", "steps": 3}).steps == 3
    assert plan_of(inputs, slicing=SliceConfig(kernel="math", steps=7)).steps == 7
    assert plan_of(inputs).kernel == "fused"
    with pytest.raises(ValueError, match="kernel: expected"):
        plan_of(inputs, slicing={"kernel": "flash"})


def test_strides_are_seen_at_the_next_call() -> None:
    inputs = layer_inputs()
    assert plan_of(inputs).kernel == "fused"
    inputs.key = inputs.key.mT.contiguous().mT
    assert plan_of(inputs).kernel == "math"


@needs_native
def test_a_scale_that_is_not_positive_is_seen_at_the_next_call() -> None:
    inputs = layer_inputs(**LARGE)
    assert [plan_of(inputs, scale=scale).kernel for scale in (0.3, -0.3, 0.7)] == ["native", "fused", "native"]
    expected = inputs.run(F.scaled_dot_product_attention, scale=0.7)
    torch.testing.assert_close(inputs.run(sliced_attention, scale=0.7), expected, rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.usefixtures("nothing_said")
def test_out_of_memory_a_known_call_goes_on_with_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    inputs = layer_inputs(**LARGE)
    expected = inputs.run(sliced_attention)
    asked: list[int] = []

    def fails_at_first(size: int) -> Tensor:
        asked.append(size)
        if len(asked) <= 2:  # as it was prepared, and once more with all threads
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes")
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(native_library(), "workspace", fails_at_first)
    with pytest.warns(SmallerSlicesWarning, match="blocks of 4 threads and goes on with those of 2"):
        found = inputs.run(sliced_attention)
    assert len(asked) == 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_a_known_call_of_other_tensors_has_their_result(sizes: dict[str, Any]) -> None:
    for scale in (None, 0.3, 0.3, None, 0.7):
        inputs = layer_inputs(**sizes)
        expected = inputs.run(F.scaled_dot_product_attention, scale=scale)
        torch.testing.assert_close(inputs.run(sliced_attention, scale=scale), expected, rtol=1e-3, atol=1e-3)


def test_masks_dropout_and_causality_are_seen_at_the_next_call() -> None:
    with using_table(NO_TABLE, "a test"):  # in which the native kernel never pays off
        inputs = layer_inputs(keys=61)
        inputs.run(sliced_attention)
        kept = torch.rand(2, 1, 61, 61) > 0.3
        for more in (
            {"attn_mask": kept[0, 0]},
            {"attn_mask": kept},
            {"attn_mask": ~kept},
            {"attn_mask": kept.float()},
            {"attn_mask": kept[:1]},
            {"is_causal": True},
            {},
        ):
            ours, theirs = (
                attention(inputs.query, inputs.key, inputs.value, **more)
                for attention in (sliced_attention, F.scaled_dot_product_attention)
            )
            assert torch.equal(ours, theirs)
        assert plan_of(inputs, dropout_p=0.5).kernel == "math"


def test_a_mask_is_seen_at_the_next_call_and_refused_where_it_does_not_fit() -> None:
    mask = torch.zeros(2, 1, 61, 53)
    inputs = layer_inputs(mask=mask)
    with using_table(NO_TABLE, "a test"):  # in which the native kernel never pays off
        assert plan_of(inputs).kernel == "fused"
        inputs.mask = mask.clone().requires_grad_()
        assert plan_of(inputs).kernel == "math"
    for refused, more in (
        (mask[..., :50], {}),
        (mask.double(), {}),
        (mask.to("meta"), {}),
        (mask, {"is_causal": True}),
    ):
        inputs.mask = refused
        for _ in range(2):
            with pytest.raises(ValueError, match=r"(attn_mask|is_causal): expected"):
                plan_of(inputs, **more)


@pytest.mark.parametrize(
    "changed",
    [
        {"key": layer_like(2, 3, 53, 11, torch.float64)},
        {"value": layer_like(2, 3, 51, 11)},
        {"key": layer_like(2, 1, 53, 11).expand(2, 2, 53, 11)},
        {"value": layer_like(2, 3, 53, 11).to("meta")},
        {"dropout_p": -0.0001},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_inputs_that_do_not_go_together_are_refused_after_ones_that_do(changed: dict[str, Any]) -> None:
    inputs = layer_inputs()
    inputs.run(sliced_attention)
    call = {"query": inputs.query, "key": inputs.key, "value": inputs.value} | changed
    with pytest.raises(ValueError, match="expected"):
        sliced_attention(**call)


@pytest.mark.parametrize("lead", [(), (3,), (2, 5, 3)], ids=str)
def test_inputs_of_other_dimensions_keep_theirs_at_every_call(lead: tuple[int, ...]) -> None:
    query, key = torch.randn(*lead, 61, 11), torch.randn(*lead, 53, 11)
    for _ in range(2):
        torch.testing.assert_close(sliced_attention(query, key, key), F.scaled_dot_product_attention(query, key, key))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_a_tangent_is_refused_at_the_next_call() -> None:
    inputs = layer_inputs()
    inputs.run(sliced_attention)
    with forward_ad.dual_level():
        inputs.query = forward_ad.make_dual(inputs.query, torch.ones_like(inputs.query))  # type: ignore[no-untyped-call]
        with pytest.raises(NotImplementedError, match="forward-mode"):
            inputs.run(sliced_attention)


def test_a_transform_is_seen_at_the_next_call() -> None:
    inputs = layer_inputs(**LARGE)
    inputs.run(sliced_attention)

    def total(query: Tensor) -> Tensor:
        return sliced_attention(query, inputs.key, inputs.value).sum()

    leaves = inputs.leaves()
    (expected,) = torch.autograd.grad(leaves.run(F.scaled_dot_product_attention).sum(), leaves.query)
    found: Tensor = torch.func.grad(total)(inputs.query)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("training", [False, True])
def test_who_looks_on_sees_operators_and_the_same_results(training: bool) -> None:
    inputs = layer_inputs(**LARGE)
    inputs = inputs.leaves() if training else inputs
    leaves = list(inputs.differentiable().values())
    alone = inputs.run(sliced_attention)
    grads = torch.autograd.grad(alone.sum(), leaves) if training else ()
    with Recorder() as seen:
        watched = inputs.run(sliced_attention)
        watched_grads = torch.autograd.grad(watched.sum(), leaves) if training else ()
    operators = [name for name in seen.names if "slicemod" in name]
    backward = ["slicemod.native_attention_backward.default"] if training else []
    assert operators == ["slicemod.native_attention.default", *backward]
    for one, other in zip((watched, *watched_grads), (alone, *grads), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", ["native", "fused-float32", "fused", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_checkpoint_runs_again_what_it_ran_at_first(kernel: str, masked: bool) -> None:
    if kernel == "native" and native_library() is None:
        pytest.skip(f"no native kernel: {native_obstacle()}")
    inputs, slicing = layer_inputs(torch.bfloat16).leaves(), SliceConfig(kernel=kernel)
    mask = torch.rand(1, 3, 1, inputs.key.shape[2]) > 0.3 if masked else None
    leaves = [inputs.query, inputs.key, inputs.value]
    output = checkpoint(sliced_attention, *leaves, mask, slicing=slicing, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), leaves)  # the first run is remembered, and this one looks it up
    plain = sliced_attention(inputs.query, inputs.key, inputs.value, mask, slicing=slicing)
    expected = torch.autograd.grad(plain.sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_not_more_calls_are_remembered_than_there_is_room_for(
    known: KnownCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "most", 3)
    for tokens in range(1, 12):
        layer_inputs(queries=tokens).run(sliced_attention)
        assert 1 <= len(known) <= 3
