"""What PyTorch's memory-efficient CUDA kernel takes on a card, against numbers from PyTorch's own headers."""

from __future__ import annotations

import pytest

from slicemod.call import AttentionShape, MaskShape
from slicemod.card import Card
from slicemod.kernels.fused.efficient_bytes import efficient_backward, efficient_forward, mask_bytes

T4, A100, RTX3090 = Card("T4", (7, 5), 40), Card("A100", (8, 0), 108), Card("RTX 3090", (8, 6), 82)
RTX4090, H100 = Card("RTX 4090", (8, 9), 128), Card("H100", (9, 0), 132)
B200, RTX5090 = Card("B200", (10, 0), 148), Card("RTX 5090", (12, 0), 170)
CARDS = (T4, A100, RTX3090, RTX4090, H100, B200, RTX5090)

# `Params::workspace_size()` of mem_eff_attention/kernel_backward.h on each of the cards above, for the variant that
# `dispatch_cutlassB` of kernels/cutlassB.h and `launchKernel` of attention_backward.cu choose. The headers are those
# that come with PyTorch 2.14.1; they were compiled for the host and asked. Batch, heads, queries, keys, width, width of
# the values, bytes of an element; dropout; deterministic.
WORKSPACES: dict[tuple[tuple[int, ...], bool, bool], tuple[int, ...]] = {
    ((1, 8, 4096, 4096, 40, 40, 2), False, False): (8396800, 8396800, 8396800, 8396800, 8396800, 8396800, 8396800),
    ((1, 8, 4096, 4096, 80, 80, 2), False, False): (
        16785408,
        16781312,
        16785408,
        16785408,
        16781312,
        16781312,
        29900800,
    ),
    ((1, 8, 4096, 4096, 80, 80, 2), True, False): (
        16785408,
        16781312,
        29900800,
        29900800,
        16781312,
        16781312,
        29900800,
    ),
    ((1, 8, 4096, 4096, 128, 128, 2), False, False): (
        16785408,
        16781312,
        29900800,
        29900800,
        16781312,
        16781312,
        29900800,
    ),
    ((2, 8, 256, 77, 160, 160, 2), False, False): (7341568, 7341568, 7341568, 7341568, 7341568, 7341568, 7341568),
    ((1, 1, 4096, 4096, 512, 512, 2), False, False): (
        25169920,
        25169920,
        25169920,
        25169920,
        25169920,
        25169920,
        25169920,
    ),
    ((1, 1, 4096, 4096, 512, 512, 2), False, True): (8654848, 8654848, 8654848, 8654848, 8654848, 8654848, 8654848),
    ((2, 8, 1009, 997, 64, 72, 2), False, False): (4196352, 8390656, 4196352, 4196352, 8390656, 8390656, 13635584),
    ((1, 8, 4096, 4096, 40, 40, 4), False, False): (8396800, 8396800, 8396800, 8396800, 8396800, 8396800, 8396800),
    ((1, 8, 4096, 4096, 128, 128, 4), False, False): (
        16793600,
        16785408,
        16793600,
        16793600,
        16785408,
        16785408,
        16793600,
    ),
    ((1, 1, 4096, 4096, 512, 512, 4), False, False): (8396800, 8392704, 8396800, 8396800, 8392704, 8392704, 8396800),
    ((32, 8, 131, 113, 96, 96, 2), False, False): (
        33570816,
        33562624,
        33570816,
        33570816,
        33562624,
        33562624,
        41967616,
    ),
}


def shape_of(sizes: tuple[int, ...], *, dropout: bool = False) -> AttentionShape:
    """The shape of a line of the table."""
    batch, heads, queries, keys, width, value_width, itemsize = sizes
    return AttentionShape(batch, heads, queries, keys, width, itemsize, value_dim=value_width, dropout=dropout)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize(("sizes", "dropout", "deterministic"), WORKSPACES)
def test_a_backward_pass_takes_its_workspace_and_the_sums_of_rows(
    sizes: tuple[int, ...], dropout: bool, deterministic: bool, card: Card
) -> None:
    workspace = WORKSPACES[sizes, dropout, deterministic][CARDS.index(card)]
    shape = shape_of(sizes, dropout=dropout)
    sums = 4 * shape.batch_heads * shape.queries
    if shape.itemsize == 4:  # (grad_out.to(kFloat) * out.to(kFloat)).sum(-1).transpose(-2, -1).contiguous()
        workspace = max(workspace, sums + 4 * shape.batch_heads * shape.queries * shape.values)
    found = efficient_backward(shape, card, merged=True, deterministic=deterministic)
    assert found == sums + workspace


@pytest.mark.parametrize(("card", "expected"), [(A100, 16.1), (H100, 16.1), (RTX3090, 28.6), (RTX4090, 28.6)])
def test_a_card_with_little_shared_memory_sums_the_gradients_of_wide_keys_in_memory(
    card: Card, expected: float
) -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 128, 2)
    found = efficient_backward(shape, card, merged=True, deterministic=False) / 2**20
    assert found == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("width", "value_width", "itemsize", "sums"),
    [(128, 128, 2, False), (136, 136, 2, True), (40, 160, 2, True), (160, 40, 2, True), (512, 512, 4, False)],
)
def test_wide_outputs_in_half_precision_are_summed_in_float32(
    width: int, value_width: int, itemsize: int, sums: bool
) -> None:
    shape = shape_of((2, 3, 61, 53, width, value_width, itemsize))  # `kNeedsOutputAccumulatorBuffer`, kernel_forward.h
    assert efficient_forward(shape) == (4 * 2 * 3 * 61 * value_width if sums else 0)


def test_a_gradient_of_a_mask_is_made_for_every_score() -> None:
    plain, mask = AttentionShape(2, 3, 61, 53, 40, 2), MaskShape(1, 1, 61, 53, has_grad=True)
    masked = AttentionShape(2, 3, 61, 53, 40, 2, mask=mask)
    found = [efficient_backward(shape, A100, merged=True, deterministic=False) for shape in (plain, masked)]
    assert found[1] - found[0] == 2 * 3 * 61 * 64 * 2  # `grad_bias` of attention_backward.cu, `alignTo` 16


def test_gradients_of_shared_keys_are_made_for_every_query_head() -> None:
    alone, shared = (AttentionShape(2, 6, 61, 53, 40, 2, value_dim=24, key_heads=heads) for heads in (6, 2))
    found = [efficient_backward(shape, A100, merged=True, deterministic=False) for shape in (alone, shared)]
    assert found[1] - found[0] == 2 * 6 * 53 * (40 + 24) * 2


def test_a_gradient_that_lies_otherwise_is_copied() -> None:
    shape = AttentionShape(2, 3, 61, 53, 40, 2, value_dim=24)
    found = [efficient_backward(shape, A100, merged=merged, deterministic=False) for merged in (True, False)]
    assert found[1] - found[0] == 2 * 3 * 61 * 24 * 2  # `grad_out_.contiguous()`


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (MaskShape(1, 1, 61, 64), 0),
        (MaskShape(1, 1, 61, 64, unaligned=True), 61 * 72 * 2),  # `pad_bias` of attention.cpp adds 1 to 8 keys
        (MaskShape(1, 3, 61, 53), 3 * 61 * 56 * 2),
        (MaskShape(1, 1, 61, 64, is_bool=True), 61 * 64 * 3),  # `convert_boolean_attn_mask`
    ],
)
def test_a_mask_is_converted_and_padded_where_it_has_to_be(mask: MaskShape, expected: int) -> None:
    assert mask_bytes(AttentionShape(2, 3, 61, mask.keys, 40, 2, mask=mask)) == expected


def test_a_card_that_is_not_nvidias_is_given_the_most_that_any_takes() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 128, 2)
    unknown = efficient_backward(shape, Card("MI300X", None, 304), merged=True, deterministic=False)
    assert unknown >= max(efficient_backward(shape, card, merged=True, deterministic=False) for card in CARDS)
