"""The native kernel's own account of itself: what it refuses and why, and what it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from slicemod import NotEnoughMemoryError, sliced_attention
from slicemod.call import AttentionShape, CallSpec
from slicemod.choose import answers, choose
from slicemod.config import SliceConfig
from slicemod.kernels.kernel import Terms
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.native.kernel import NativeKernel

SHAPE = AttentionShape(2, 6, 521, 523, 40, 4)
CALL = CallSpec(SHAPE, torch.float32, torch.device("cpu"), threads=2)

needs_native = pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")


@needs_native
def test_it_takes_a_plain_call_and_counts_its_bytes() -> None:
    kernel = NativeKernel()
    assert kernel.obstacle(CALL) is None
    plan = kernel.plan(CALL, 2**30, Terms())
    assert plan is not None
    assert plan.kernel == "native"
    assert kernel.plan(CALL, plan.peak_bytes, Terms()) == plan
    assert kernel.plan(CALL, plan.peak_bytes - 1, Terms()) is None


@needs_native
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cuda")}, "it runs on CPUs, and the call is on cuda"),
        ({"dtype": torch.float64}, "does not compute torch.float64"),
        ({"transformed": True}, "torch.func"),
        ({"ordinary_scale": False}, "a scale that is not positive"),
        ({"shape": replace(SHAPE, keys=1), "training": True}, "one key"),
    ],
)
def test_what_it_cannot_compute_is_said(changes: dict[str, Any], reason: str) -> None:
    obstacle = NativeKernel().obstacle(replace(CALL, **changes))
    assert obstacle is not None
    assert reason in obstacle


@needs_native
def test_asked_for_by_name_it_runs_where_another_is_faster_and_raises_where_it_cannot() -> None:
    small = replace(CALL, shape=AttentionShape(1, 2, 5, 7, 11, 4))
    assert choose(small, SliceConfig(kernel="native"), 2**30).kernel == "native"
    assert choose(small, SliceConfig(), 2**30).kernel == "fused"
    double = replace(CALL, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'kernel="native"; it does not compute torch\.float64'):
        choose(double, SliceConfig(kernel="native"), 2**30)
    with pytest.raises(NotEnoughMemoryError, match='kernel="native" with budget=1000: needs'):
        choose(CALL, SliceConfig(1000, kernel="native"), 1000)


@needs_native
@pytest.mark.parametrize("shape", [(1, 2, 5, 7, 11), (2, 3, 67, 61, 300)], ids=str)
def test_asked_for_by_name_it_computes_small_and_wide_calls_too(shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys, width = shape
    query, key, value = (torch.randn(batch, heads, tokens, width) for tokens in (queries, keys, keys))
    exact = torch.softmax(query.double() @ key.double().mT / width**0.5, -1) @ value.double()
    found = sliced_attention(query, key, value, slicing={"kernel": "native"})
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_why_it_was_passed_over_is_told() -> None:
    told = {
        answer.kernel: answer.passed_over
        for answer in answers(replace(CALL, dtype=torch.float64), SliceConfig(), 2**30)
    }
    assert told["native"] is not None
