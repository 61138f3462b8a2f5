"""Which of PyTorch's CUDA kernels take a call on a card, by the conditions in PyTorch's sources."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod.call import AttentionShape, CallSpec, Layout, MaskShape
from slicemod.card import Card
from slicemod.kernels.fused import cuda_conditions, obstacles
from slicemod.kernels.fused.cuda_conditions import efficient_refuses, flash_refuses, kernels_of_card
from slicemod.kernels.fused.kernel import fused_peak
from slicemod.kernels.fused.obstacles import fused_obstacle
from tests.kernels.fused.test_cuda_bytes import call_of
from tests.kernels.fused.test_efficient_bytes import A100, B200, CARDS, H100, RTX3090, RTX5090, T4

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
VOLTA, PASCAL, NEWER = Card("V100", (7, 0), 80), Card("P100", (6, 0), 56), Card("next", (13, 0), 200)


def shape_of(width: int = 64, dtype: torch.dtype = F16, **more: Any) -> AttentionShape:
    return AttentionShape(2, 6, 61, 53, width, dtype.itemsize, **more)


# (card, dtype, width, is there a flash kernel, is there a memory-efficient one): `check_dtypes_low_precision`,
# `check_flash_attention_hardware_support`, `check_mem_efficient_hardware_support`, `check_head_dim_size_flash`,
# `check_head_dim_size_mem_efficient` and `minimum_gemm_alignment` of sdp_utils.cpp.
TAKEN = [
    (T4, F16, 40, False, True),
    (T4, F32, 40, False, True),
    (T4, BF16, 40, False, False),
    (T4, F16, 44, False, False),
    (T4, F32, 41, False, True),
    (VOLTA, F16, 64, False, True),
    (PASCAL, F16, 41, False, True),
    (A100, BF16, 64, True, True),
    (A100, F16, 41, True, False),
    (A100, F32, 44, False, True),
    (A100, F32, 42, False, False),
    (A100, F16, 256, True, True),
    (A100, F16, 512, False, True),
    (H100, F32, 512, False, True),
    (B200, BF16, 160, True, True),
    (RTX5090, F16, 80, True, True),
    (NEWER, F16, 64, False, False),
    (A100, torch.float64, 64, False, False),
]


@pytest.mark.parametrize(("card", "dtype", "width", "flash", "efficient"), TAKEN)
def test_a_card_takes_what_the_sources_say(
    card: Card, dtype: torch.dtype, width: int, flash: bool, efficient: bool
) -> None:
    call = call_of(shape_of(width, dtype), card, dtype)
    assert (flash_refuses(call) is None, efficient_refuses(call) is None) == (flash, efficient)
    assert (fused_obstacle(call) is None) == (flash or efficient)


@pytest.mark.parametrize(
    ("card", "width", "dropout", "taken"),
    [
        (A100, 256, True, True),
        (RTX3090, 192, True, True),
        (RTX3090, 200, False, False),
        (RTX3090, 256, False, True),
        (RTX3090, 256, True, False),
        (RTX5090, 224, False, False),
    ],
)
def test_flash_attention_trains_wide_heads_where_there_is_shared_memory(
    card: Card, width: int, dropout: bool, taken: bool
) -> None:
    shape = shape_of(width, dropout=dropout)
    assert flash_refuses(call_of(shape, card)) is None
    assert (flash_refuses(call_of(shape, card, training=True)) is None) == taken


MASK = MaskShape(1, 1, 61, 53)
SERVED = {
    "the gradient of a mask": shape_of(mask=MaskShape(1, 1, 61, 53, has_grad=True)),
    "dropout with a mask": shape_of(mask=MASK, dropout=True),
    "the VAE's head": AttentionShape(1, 1, 4096, 4096, 512, 2),
    "values of another width": shape_of(value_dim=24),
    "causal, more queries than keys": shape_of(causal=True),
}


@pytest.mark.parametrize("what", SERVED)
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_memory_efficient_kernel_serves_what_flash_attention_does_not(what: str, card: Card) -> None:
    call = call_of(SERVED[what], card, training=True)
    assert kernels_of_card(call) == ("efficient",)
    assert fused_obstacle(call) is None
    assert fused_peak(call) > 0


def test_pytorchs_own_answer_counts_where_it_was_asked() -> None:
    call = call_of(shape_of(), A100, layout=Layout(runs=()))
    assert fused_obstacle(call) == "PyTorch says that neither flash nor memory-efficient attention takes the call"
    assert fused_obstacle(call_of(shape_of(41, F32), A100, F32, layout=Layout(runs=("efficient",)))) is None


def test_the_obstacle_says_what_each_kernel_wants() -> None:
    obstacle = fused_obstacle(call_of(shape_of(dtype=BF16), T4, BF16))
    assert obstacle is not None
    assert "Flash attention: it wants a compute capability from 8.0 to 12.1, T4 has 7.5" in obstacle
    assert "Memory-efficient attention: it has no bfloat16 on T4" in obstacle


def test_a_mask_that_is_broadcast_along_the_keys_is_not_given_to_pytorch() -> None:
    obstacle = fused_obstacle(call_of(shape_of(mask=MaskShape(1, 1, 61, 1)), A100))
    assert obstacle is not None
    assert "broadcast along the keys" in obstacle


@pytest.mark.parametrize(("version", "crashes"), [((2, 9), True), ((2, 13), True), ((2, 14), False), ((3, 0), False)])
def test_the_gradient_of_a_mask_alone_is_refused_where_pytorch_crashes(
    version: tuple[int, int], crashes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstacles, "PYTORCH", version)
    mask, layout = MaskShape(1, 1, 61, 53, has_grad=True), Layout(mask_dims=4, mask_requires_grad=True)
    alone = layout._replace(only_mask_requires_grad=True)
    shape = shape_of(mask=mask)
    assert fused_obstacle(call_of(shape, A100, training=True, layout=layout)) is None
    assert (fused_obstacle(call_of(shape, A100, training=True, layout=alone)) is not None) == crashes
    assert fused_obstacle(call_of(shape, A100, training=False, layout=alone)) is None


@pytest.mark.parametrize(("version", "taken"), [((2, 13), False), ((2, 14), True)])
def test_shared_key_heads_are_memory_efficient_from_pytorch_2_14_on(
    version: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_conditions, "PYTORCH", version)
    call = call_of(shape_of(dtype=F32, key_heads=2), A100, F32)
    assert (efficient_refuses(call) is None) == taken
    assert flash_refuses(call_of(shape_of(key_heads=2), A100)) is None


def test_a_call_that_is_planned_for_a_gpu_is_planned_for_what_runs_there() -> None:
    assert fused_obstacle(CallSpec.planned(shape_of(), "cuda")) is None
    assert fused_obstacle(CallSpec.planned(shape_of(8, torch.float64), "cuda")) is not None
