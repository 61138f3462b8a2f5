"""A native call that is known gives the bits that the operators give, whatever its tensors and gradients are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from slicemod.functional import sliced_attention
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.retry import SmallerSlicesWarning
from slicemod.known_calls import KNOWN_CALLS
from tests.kernels.features import inputs_of
from tests.kernels.native.test_binding import KINDS, plain
from tests.kernels.native.test_operators import native
from tests.oracle import Inputs, layer_inputs, layer_like, results
from tests.pairwise import pairwise

pytestmark = pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")

known_native = partial(sliced_attention, slicing={"kernel": "native"})


def known(inputs: Inputs) -> Inputs:
    """The inputs, of which calls are known from now on."""
    inputs.leaves().run(known_native)
    return inputs


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """No call is known at first."""
    KNOWN_CALLS.clear()


@pytest.fixture
def no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known calls that go to the operators fail."""
    for name in ("native_attention", "native_gradients"):
        monkeypatch.setattr(f"slicemod.kernels.native.prepared.{name}", None)


@pytest.mark.parametrize(
    ("dtype", "mask", "widths", "key_heads"),
    pairwise(
        [torch.float32, torch.bfloat16, torch.float16],
        ["none", "bool", "bool with dead rows", "additive", "additive in float32", "causal", "gradient"],
        [(11, 11), (40, 40), (13, 160)],
        [None, 1],
    ),
    ids=str,
)
@pytest.mark.usefixtures("no_operators")
def test_it_gives_the_bits_of_the_operators(
    dtype: torch.dtype, mask: str, widths: tuple[int, int], key_heads: int | None
) -> None:
    inputs = known(inputs_of(dtype, mask, "long", widths, key_heads))
    grad = layer_like(2, 2, 71, widths[1], dtype)
    assert_same_bits(results(known_native, inputs.leaves(), grad), results(native, inputs.leaves(), grad))


@pytest.mark.usefixtures("no_operators")
def test_the_gradient_of_the_output_may_have_any_layout() -> None:
    inputs = known(layer_inputs())
    layer, rows = layer_like(2, 3, 61, 11), torch.randn(2, 3, 61, 11)
    layouts = [layer, rows, rows.mT.contiguous().mT, torch.ones(()).expand(2, 3, 61, 11), layer]
    for grad in layouts:
        assert_same_bits(results(known_native, inputs.leaves(), grad), results(native, inputs.leaves(), grad))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_output_may_be_a_view(kind: Callable[[tuple[int, ...]], Tensor]) -> None:
    inputs, grad = known(layer_inputs()), kind((2, 3, 61, 11))
    found, wanted = (results(known_native, inputs.leaves(), each) for each in (grad, plain(grad)))
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_may_be_a_view(kind: Callable[[tuple[int, ...]], Tensor], which: str) -> None:
    inputs, view = layer_inputs(), kind((2, 3, 53 if which != "query" else 61, 11))
    setattr(inputs, which, torch.empty_strided(view.shape, view.stride()) if 0 not in view.stride() else view)
    known(inputs)
    grad = layer_like(2, 3, 61, 11)
    setattr(inputs, which, view)
    found = results(known_native, inputs.leaves(), grad)
    setattr(inputs, which, plain(view))
    assert_same_bits(found, results(native, inputs.leaves(), grad))


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_gradients_that_nobody_asked_for_are_left_out(which: str) -> None:
    inputs = layer_inputs()
    grad = layer_like(2, 3, 61, 11)
    wanted = results(native, inputs.leaves(), grad)[which]
    tensor = getattr(inputs, which).requires_grad_()
    for _ in range(2):
        output = inputs.run(known_native)
        assert torch.equal(torch.autograd.grad(output, [tensor], grad)[0], wanted)


def test_the_gradients_can_be_differentiated_again() -> None:
    inputs = known(layer_inputs()).leaves()

    def second(attention: Callable[..., Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(inputs.run(attention).square().sum(), [inputs.query], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [inputs.key])[0]

    found = second(known_native)
    assert float(found.abs().max()) > 0
    torch.testing.assert_close(found, second(native))


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    parts = torch.randn(2, 61, 3 * 3 * 11).chunk(3, -1)
    query, key, value = (part.reshape(2, 61, 3, 11).transpose(1, 2) for part in parts)
    inputs = known(Inputs(query, key, value))
    grad = layer_like(2, 3, 61, 11)
    wanted = results(known_native, inputs.leaves(), grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.contiguous().clone(), lambda packed: packed):
        assert_same_bits(results(known_native, inputs.leaves(), grad), wanted)


def test_a_graph_may_be_gone_through_twice() -> None:
    inputs = known(layer_inputs()).leaves()
    output = inputs.run(known_native)
    once, twice = (torch.autograd.grad(output.sum(), [inputs.value], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


def test_it_does_not_keep_tensors_alive_after_the_backward_pass() -> None:
    leaves = known(layer_inputs()).leaves()
    made = Inputs(leaves.query * 2, leaves.key * 2, leaves.value * 2)
    output = made.run(known_native)
    watched = [weakref.ref(tensor) for tensor in (made.query, made.key, made.value)]
    torch.autograd.grad(output.sum(), [leaves.query, leaves.key, leaves.value])
    del made
    gc.collect()
    assert [tensor() for tensor in watched] == [None] * 3


@pytest.mark.usefixtures("nothing_said")
def test_out_of_memory_each_pass_goes_on_with_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    inputs = known(layer_inputs(queries=1031, keys=509))
    grad = layer_like(2, 3, 1031, 11)
    wanted = results(native, inputs.leaves(), grad)
    asked: list[int] = []

    def fails_at_first(size: int) -> Tensor:
        asked.append(size)
        if len(asked) in (1, 2, 4, 5):  # in both passes, as prepared and with all threads
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes")
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(native_library(), "workspace", fails_at_first)
    with pytest.warns(SmallerSlicesWarning, match="blocks of 4 threads and goes on with those of 2"):
        found = results(known_native, inputs.leaves(), grad)
    assert len(asked) == 6
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])
