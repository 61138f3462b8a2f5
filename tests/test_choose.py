"""The list of kernels: the first that can, pays off and fits takes a call; a new one is a class and a line."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slicemod import MemoryAwareCrossAttention, NotEnoughMemoryError, SlicePlan, kernels
from slicemod.call import AttentionShape, CallSpec, MaskShape
from slicemod.choose import answers, choose, plan_slices, plans_of
from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.kernel import Arguments, Inputs, Kernel, Terms
from tests.measured_peak import measured_peak
from tests.oracle import assert_as_exact_as_sdpa, layer_inputs

CPU = torch.device("cpu")
CALL = CallSpec(AttentionShape(2, 3, 61, 53, 11, 4), torch.float32, CPU)


class ToyKernel(Kernel):
    """Full attention of PyTorch's in float64, for calls of a few tokens."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "for this test"

    def obstacle(self, call: CallSpec) -> str | None:
        return "it takes no more than 64 queries" if call.shape.queries > 64 else None

    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        shape = call.shape
        need = 3 * 8 * shape.batch_heads * shape.queries * shape.keys
        plan = SlicePlan("query", 1, shape.queries, need, self.name, terms.policy, shape.batch_heads, shape.queries)
        return plan if need <= free_bytes else None

    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        query, key, value, _ = (None if tensor is None else tensor.double() for tensor in inputs)
        assert query is not None
        assert key is not None
        assert value is not None
        return F.scaled_dot_product_attention(query, key, value).to(inputs[0].dtype)


@pytest.fixture
def with_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", (ToyKernel(), *kernels.KERNELS))


@pytest.mark.usefixtures("with_toy")
def test_a_new_kernel_is_a_line_in_the_list() -> None:
    layer = MemoryAwareCrossAttention(33, heads=3, dim_head=11)
    x = torch.randn(2, 53, 33)
    layer(x)
    assert layer.plan is not None
    assert layer.plan.kernel == "toy"
    layer(torch.randn(2, 67, 33))  # more than it takes
    assert layer.plan.kernel != "toy"
    assert plan_slices(CALL.shape, 2**20, kernel="toy", device_type="cpu").kernel == "toy"
    with pytest.raises(ValueError, match='kernel="toy"; it takes no more than 64 queries'):
        MemoryAwareCrossAttention(33, heads=3, dim_head=11, slicing={"kernel": "toy"})(torch.randn(2, 67, 33))
    with pytest.raises(NotEnoughMemoryError, match='kernel="toy" with budget=1000: needs'):
        choose(CALL, SliceConfig(1000, kernel="toy"), 1000)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_without_the_line_there_is_no_such_kernel() -> None:
    with pytest.raises(
        ValueError, match="kernel: expected one of auto, native, fused-float32, fused, triton, math; got 'toy'"
    ):
        SliceConfig(kernel="toy")


def test_every_kernel_answers_and_one_is_taken() -> None:
    told = answers(CALL, SliceConfig(), 2**30)
    assert [answer.kernel for answer in told] == [kernel.name for kernel in kernels.KERNELS]
    assert [answer.kernel for answer in told if answer.passed_over is None] == ["fused"]
    assert {answer.kernel: answer.passed_over for answer in told}["math"] == "fused comes before it"


@pytest.mark.parametrize("kernel", ["native", "fused-float32", "fused", "triton", "math"])
def test_the_one_that_is_taken_is_the_one_that_is_chosen(kernel: str) -> None:
    masked = replace(CALL, shape=replace(CALL.shape, mask=MaskShape(1, 1, 61, 53, other_dtype=True)))
    for call in (CALL, masked):
        slicing = SliceConfig(kernel=kernel)
        taken = [answer for answer in answers(call, slicing, 2**30) if answer.passed_over is None]
        if taken:
            assert choose(call, slicing, 2**30) == taken[0].plan
        else:
            with pytest.raises(ValueError, match=f'kernel="{kernel}"'):
                choose(call, slicing, 2**30)


def test_a_kernel_that_does_not_fit_gives_way_to_the_next() -> None:
    fused = choose(CALL, SliceConfig(kernel="fused"), 2**30)
    assert choose(CALL, SliceConfig(), fused.peak_bytes).kernel == "fused"
    tight = choose(CALL, SliceConfig(), fused.peak_bytes - 1)
    assert tight.kernel == "math"
    assert tight.peak_bytes < fused.peak_bytes
    told = {answer.kernel: answer.passed_over for answer in answers(CALL, SliceConfig(), fused.peak_bytes - 1)}
    assert "it needs more than" in str(told["fused"])


@pytest.mark.parametrize("policy", ["heuristic", "doggettx", "invokeai", "mps", "exact"])
@pytest.mark.parametrize("free", [10**5, 10**6, 10**7, 10**8])
def test_no_call_follows_a_plan_that_takes_more_than_its_budget(policy: str, free: int) -> None:
    call = CallSpec(AttentionShape(2, 8, 1031, 1031, 40, 4), torch.float32, CPU)
    for slicing in (SliceConfig("auto", policy, "math"), SliceConfig(free, policy, "math")):
        try:
            assert choose(call, slicing, free).peak_bytes <= free
        except NotEnoughMemoryError as error:
            assert str(error)  # noqa: PT017 - either is right, and nothing else


def test_the_default_computes_what_fits() -> None:
    call = CallSpec(AttentionShape(2, 8, 4096, 4096, 40, 4), torch.float32, CPU)
    plan = choose(call, SliceConfig(kernel="math"), 128 * 2**20)
    assert plan.peak_bytes < 10 * 2**20
    assert plan.policy == "exact"


def test_the_best_plan_of_a_call_is_made_once() -> None:
    plans = plans_of(CALL, SliceConfig("64MiB"))
    assert plans.now() is plans.now() is plans.best


def test_a_given_plan_that_does_not_suit_a_call_is_refused() -> None:
    query = torch.randn(1, 2, 67, 11)
    plan = plan_slices(AttentionShape(1, 2, 67, 67, 11, 4), 2**20, kernel="fused", device_type="cpu")
    with pytest.raises(ValueError, match='plan: expected one made for this call; got one of kernel="fused", and'):
        planned_attention(query, query, query, dropout_p=0.3, plan=plan)


def planned(tokens: int, kernel: str, *, training: bool = False) -> SlicePlan:
    """The plan of 2 heads of self-attention, in bfloat16 for the kernel that is for half precision."""
    shape = AttentionShape(1, 2, tokens, tokens, 11, 2 if kernel == "fused-float32" else 4)
    return plan_slices(shape, 2**22, kernel=kernel, device_type="cpu", training=training)


KERNELS = ["native", "fused-float32", "fused", "math"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_given_plan_that_does_not_hold_for_a_larger_call_is_refused(kernel: str) -> None:
    query = torch.randn(1, 2, 2003, 11, dtype=torch.float16 if kernel == "fused-float32" else torch.float32)
    plan = planned(61, kernel, training=True)
    needing = query.clone().requires_grad_()
    words = (
        f"plan: .* got one of {plan.peak_bytes:,} bytes, and 1 x 2 heads, 2003 queries .*, with gradients, take more"
    )
    with pytest.raises(ValueError, match=words):
        planned_attention(needing, query, query, plan=plan)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("training", [False, True])
def test_a_given_plan_of_a_larger_call_is_followed_within_its_bytes(kernel: str, training: bool) -> None:
    inputs = layer_inputs(torch.float16 if kernel == "fused-float32" else torch.float32, batch=1, heads=2, width=11)
    plan = planned(2003, kernel, training=training)
    assert measured_peak(inputs, partial(sliced_attention, plan=plan), training=training) <= plan.peak_bytes
    assert planned_attention(inputs.query, inputs.key, inputs.value, plan=plan)[1] is plan
    assert_as_exact_as_sdpa(partial(sliced_attention, plan=planned(2003, kernel, training=True)), inputs)


@pytest.mark.parametrize("more", [{"is_causal": True}, {"dropout_p": 0.3}, {"attn_mask": torch.ones(67, 67).bool()}])
def test_a_given_plan_is_refused_for_what_it_did_not_count(more: dict[str, Any]) -> None:
    query, plan = torch.randn(1, 2, 67, 11), planned(67, "math")
    assert planned_attention(query, query, query, plan=plan)[1] is plan
    with pytest.raises(ValueError, match=r"take more by it\. Leave plan out, or make one for this call"):
        planned_attention(query, query, query, plan=plan, **more)


def test_a_given_plan_that_does_not_hold_is_refused_by_the_compiler_too() -> None:
    query, plan = torch.randn(1, 2, 67, 11), planned(61, "math")
    compiled = torch.compile(partial(sliced_attention, plan=plan), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="take more by it"):
        compiled(query, query, query)
