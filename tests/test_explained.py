"""`explain` says what `sliced_attention` then does, of tensors with memory and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod import NotEnoughMemoryError, explain, kernels
from slicemod.choose import Answer
from slicemod.functional import planned_attention


def taken(answers: list[Answer]) -> Answer:
    (answer,) = [answer for answer in answers if answer.passed_over is None]
    return answer


def call(**more: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(2, 3, 61, 11), torch.randn(2, 3, 53, 11), torch.randn(2, 3, 53, 11)
    return tuple(tensor.to(**more) for tensor in (query, key, value))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "more",
    [{}, {"is_causal": True}, {"dropout_p": 0.3}, {"attn_mask": torch.ones(61, 53, dtype=torch.bool)}],
    ids=["plain", "causal", "dropout", "mask"],
)
def test_the_kernel_and_the_plan_are_those_of_the_call(
    dtype: torch.dtype, training: bool, more: dict[str, Any]
) -> None:
    inputs = call(dtype=dtype)
    for tensor in inputs:
        tensor.requires_grad_(training)
    slicing = {"budget": "64MiB"}
    told = explain(*inputs, **more, slicing=slicing)
    assert [answer.kernel for answer in told] == [kernel.name for kernel in kernels.KERNELS]
    assert taken(told).plan == planned_attention(*inputs, **more, slicing=slicing)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_tensors_without_memory_are_answered_as_those_with(dtype: torch.dtype, training: bool) -> None:
    there, meta = call(dtype=dtype), call(dtype=dtype, device="meta")
    for tensor in (*there, *meta):
        tensor.requires_grad_(training)
    slicing = {"budget": "64MiB"}
    assert explain(*meta, slicing=slicing, device="cpu") == explain(*there, slicing=slicing)


def test_a_device_that_is_not_there_is_planned_for() -> None:
    told = explain(*call(device="meta", dtype=torch.float16), slicing={"budget": 2**26}, device="cuda")
    assert taken(told).kernel == "fused"
    assert str(told[0]) == "native: it runs on CPUs, and the call is on cuda"
    sliced = explain(
        *call(device="meta", dtype=torch.float16), slicing={"budget": 2**26, "kernel": "math"}, device="cuda"
    )
    plan = taken(sliced).plan
    assert plan is not None
    assert plan.upcast


def test_tensors_without_memory_need_a_device() -> None:
    with pytest.raises(ValueError, match=r'device: expected .* got meta\. Pass for example device="cuda"'):
        explain(*call(device="meta"))


def test_where_none_is_taken_the_call_raises() -> None:
    slicing = {"budget": 16}
    assert all(answer.passed_over for answer in explain(*call(), slicing=slicing))
    with pytest.raises(NotEnoughMemoryError):
        planned_attention(*call(), slicing=slicing)


def test_nothing_to_attend_to_has_no_answers() -> None:
    query, key, value = call()
    assert explain(query, key[:, :, :0], value[:, :, :0]) == []


def test_what_no_attention_can_be_computed_of_is_refused() -> None:
    query, key, value = call()
    with pytest.raises(ValueError, match="query, key, value: expected"):
        explain(query, key, value[:, :, :-1])


def test_an_answer_reads_as_a_line() -> None:
    told = explain(*call(), slicing={"kernel": "math", "budget": "1MiB"})
    plan = taken(told).plan
    assert plan is not None
    assert [str(answer) for answer in told] == [
        *(f'{kernel.name}: kernel="math" is asked for' for kernel in kernels.KERNELS[:-1]),
        f"math, {plan.peak_bytes:,} bytes (exact): taken",
    ]
