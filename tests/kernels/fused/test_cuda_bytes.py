"""What fused CUDA kernels take: read off PyTorch's allocator on an H200 (132 processors, PyTorch 2.11), and for other
cards from PyTorch's sources."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod.call import AttentionShape, CallSpec, Layout
from slicemod.card import ASSUMED_CARD, Card, card_of
from slicemod.kernels.fused.cuda_bytes import CUDNN, EFFICIENT, FLASH, cuda_fused_peak, cudnn_is_known
from slicemod.kernels.fused.cuda_conditions import kernels_of_card
from slicemod.kernels.fused.flash_bytes import flash_backward, flash_forward, flash_splits
from slicemod.kernels.fused.kernel import fused_peak
from tests.kernels.fused.test_efficient_bytes import A100, B200, CARDS, H100, RTX3090, T4

# Batch, heads, queries, keys, head dim, bytes of an element; the most that one of flash, memory-efficient and cuDNN
# attention took beyond inputs, output and gradients, in inference and in training.
MEASURED = {
    (2, 8, 4096, 4096, 40, 2): (263168, 17318400),
    (1, 8, 4096, 4096, 40, 4): (0, 8658944),
    (2, 8, 1024, 1024, 80, 2): (66560, 8521728),
    (2, 8, 256, 256, 160, 2): (12665856, 12665856),
    (2, 8, 256, 256, 160, 4): (0, 3180032),
    (2, 8, 64, 64, 160, 4): (0, 1582080),
    (2, 8, 4096, 77, 40, 2): (263168, 17318400),
    (2, 10, 4096, 4096, 64, 2): (328704, 21647360),
    (2, 10, 4096, 4096, 64, 4): (0, 21954560),
    (2, 20, 1024, 77, 64, 2): (164864, 10823680),
    (1, 8, 16384, 16384, 40, 2): (525312, 34635776),
    (1, 1, 4096, 4096, 512, 2): (8388608, 25202688),
    (1, 3, 1009, 997, 72, 2): (4711760, 4711760),
    (1, 1, 3001, 3001, 256, 2): (15438848, 15438848),
}


H200 = Card("H200", (9, 0), 132)


def call_of(shape: AttentionShape, card: Card, dtype: torch.dtype = torch.float16, **more: Any) -> CallSpec:
    """A call on a simulated card."""
    layout = more.pop("layout", Layout(mask_dims=0 if shape.mask is None else 4))
    return CallSpec(shape, dtype, torch.device("cuda"), card=card, layout=layout, **more)


@pytest.mark.parametrize("sizes", MEASURED)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_kernel_was_seen_to_take_more(sizes: tuple[int, int, int, int, int, int], training: bool) -> None:
    measured = MEASURED[sizes][training]
    call = call_of(AttentionShape(*sizes), H200, torch.float16 if sizes[5] == 2 else torch.float32, training=training)
    promised = cuda_fused_peak(call, kernels_of_card(call))
    rounding = 1024  # of the allocator, to blocks of 512 bytes
    assert measured - rounding <= promised
    if measured > 0:  # what float32 keeps for a backward pass is counted in inference as well
        assert promised <= 1.05 * measured


# Bytes of flash attention's backward pass for 1 x 8 heads of 4096 queries and keys, by `mha_bwd` of flash_api.cpp:
# `softmax_d` of (B, H, N) and `dq_accum` of (B, N, H, width rounded up to 32), both float32. It has no variants, and
# is the same on every card from sm_80 on; deterministic, `dq_accum` is there ceil(processors / (B H)) times.
ROWS = 8 * 4096 * 4


@pytest.mark.parametrize(("card", "width", "sums"), [(A100, 64, 14), (RTX3090, 64, 11), (H100, 64, 17), (B200, 96, 19)])
def test_flash_attention_keeps_a_gradient_for_each_processor_where_it_has_to_be_deterministic(
    card: Card, width: int, sums: int
) -> None:
    shape = AttentionShape(1, 8, 4096, 4096, width, 2)
    assert flash_backward(shape, card, merged=True, deterministic=False) == ROWS * (1 + width)
    assert flash_backward(shape, card, merged=True, deterministic=True) == ROWS * (1 + sums * width)


def test_the_plan_of_a_call_that_has_to_be_deterministic_counts_it() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 64, 2)
    once, often = (
        cuda_fused_peak(call_of(shape, H100, training=True, deterministic=deterministic), (FLASH,))
        for deterministic in (False, True)
    )
    assert often - once == 16 * ROWS * 64


def test_flash_attention_copies_an_output_that_lies_otherwise_and_its_gradient() -> None:
    shape = AttentionShape(2, 3, 61, 53, 40, 2)
    found = [flash_backward(shape, H100, merged=merged, deterministic=False) for merged in (True, False)]
    assert found[1] - found[0] == 2 * 2 * 3 * 61 * 40 * 2  # `out.contiguous()` and `grad_out.contiguous()`
    call = call_of(shape, H100, training=True, layout=Layout(merged=False))
    assert cuda_fused_peak(call, (FLASH,)) > cuda_fused_peak(call_of(shape, H100, training=True), (FLASH,))


def test_a_gpu_that_is_full_splits_no_keys() -> None:
    shape = AttentionShape(2, 8, 1009, 1009, 64, 2)  # 256 blocks of 64 rows
    assert flash_splits(shape, 108) == 1
    assert flash_splits(shape, 1000) == 4


def test_keys_are_not_split_with_dropout() -> None:
    shapes = [AttentionShape(2, 8, 256, 256, 160, 2, dropout=dropout) for dropout in (False, True)]
    assert [flash_splits(shape, 132) for shape in shapes] == [4, 1]


@pytest.mark.parametrize("processors", [1, 20, 46, 132, 160])
def test_there_are_no_more_splits_than_blocks_of_keys(processors: int) -> None:
    for keys in (1, 255, 257, 4099, 10**6):
        assert 1 <= flash_splits(AttentionShape(1, 1, 61, keys, 64, 2), processors) <= min(128, -(-keys // 256))


def test_an_odd_width_costs_padded_copies() -> None:
    odd, even = (AttentionShape(2, 5, 1024, 1024, width, 2) for width in (61, 64))
    rows = 2 * 5 * 1024 * 64 * 2
    assert flash_forward(odd, Card("", (8, 0), 1)) - flash_forward(even, Card("", (8, 0), 1)) == 4 * rows
    peaks = [flash_backward(shape, H100, merged=True, deterministic=False) for shape in (odd, even)]
    # Query, key, value and output padded, with their gradients; and copies of output and gradient, which then lie as
    # (B, H, N, D).
    assert peaks[0] - peaks[1] == (8 + 2) * rows


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_only_the_kernels_that_can_run_are_counted(card: Card) -> None:
    wide = call_of(AttentionShape(1, 1, 4096, 4096, 512, 2), card, training=True)
    assert kernels_of_card(wide) == (EFFICIENT,)
    narrow = call_of(AttentionShape(1, 8, 4096, 4096, 80, 2), card, training=True)
    runs = kernels_of_card(narrow)
    assert (FLASH in runs) == (card is not T4)
    assert cuda_fused_peak(narrow, runs) == max(cuda_fused_peak(narrow, (name,)) for name in runs)
    assert cuda_fused_peak(narrow, (FLASH,)) != cuda_fused_peak(narrow, (EFFICIENT,))


@pytest.mark.parametrize(
    ("card", "widths", "plain", "known"),
    [(H100, (64, 64), True, True), (H100, (64, 64), False, False), (H100, (192, 128), True, False)]
    + [(card, (64, 64), True, False) for card in (A100, B200)],
)
def test_cudnns_workspace_is_known_where_it_was_measured(
    card: Card, widths: tuple[int, int], plain: bool, known: bool
) -> None:
    assert cudnn_is_known(card, *widths, plain=plain) == known


def test_cudnn_is_counted_as_what_was_measured() -> None:
    call = call_of(AttentionShape(2, 8, 4096, 4096, 40, 2), H100, training=True)
    assert CUDNN in kernels_of_card(call)
    assert cuda_fused_peak(call, (CUDNN,)) == cuda_fused_peak(call, (FLASH,))


@pytest.mark.parametrize(
    ("choice", "counted"), [(1, (FLASH,)), (2, (EFFICIENT,)), (3, (FLASH, EFFICIENT)), (None, (FLASH, EFFICIENT))]
)
def test_pytorchs_choice_is_what_is_counted(choice: int | None, counted: tuple[str, ...]) -> None:
    layout = Layout(runs=(FLASH, EFFICIENT), choice=choice)  # of these it runs one, whatever cuDNN could do
    call = call_of(AttentionShape(1, 8, 4096, 4096, 128, 2), RTX3090, training=True, layout=layout)
    assert fused_peak(call) == cuda_fused_peak(call, counted)
    assert cuda_fused_peak(call, (FLASH,)) < cuda_fused_peak(call, (EFFICIENT,))


def test_a_gpu_that_is_not_there_is_assumed() -> None:
    assert card_of(torch.device("cpu")) == ASSUMED_CARD
    if not torch.cuda.is_available():
        assert card_of(torch.device("cuda")) == ASSUMED_CARD


@pytest.mark.cuda
def test_a_gpu_tells_what_it_is() -> None:
    properties: Any = torch.cuda.get_device_properties(0)
    card = card_of(torch.device("cuda"))
    assert card.processors == properties.multi_processor_count
    if torch.version.hip is None:
        assert card.capability == (properties.major, properties.minor)
        assert card.shared_memory == properties.shared_memory_per_block_optin
