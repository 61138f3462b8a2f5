"""AttentionShape: sizes and byte formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod.call import AttentionShape, CallSpec, MaskShape, attention_shape, attention_sizes


def test_scores_take_batch_heads_queries_keys_elements() -> None:
    shape = AttentionShape(2, 3, 5, 7, 11, 2)
    assert shape.scores_bytes == 2 * 3 * 5 * 7 * 2
    assert shape.batch_heads == 6


@pytest.mark.parametrize(("itemsize", "upcast", "expected"), [(2, False, 2), (2, True, 4), (4, True, 4), (8, True, 8)])
def test_upcast_scores_have_at_least_four_bytes(itemsize: int, upcast: bool, expected: int) -> None:
    shape = AttentionShape(2, 3, 5, 7, 11, itemsize, upcast=upcast)
    assert shape.score_itemsize == expected
    assert shape.scores_bytes == 2 * 3 * 5 * 7 * expected


def test_values_are_as_wide_as_queries_unless_said_otherwise() -> None:
    assert AttentionShape(2, 3, 5, 7, 11, 4).values == 11
    assert AttentionShape(2, 3, 5, 7, 11, 4, value_dim=13).values == 13


@pytest.mark.parametrize("name", ["batch", "heads", "queries", "keys", "head_dim"])
def test_a_negative_size_is_refused_by_name(name: str) -> None:
    sizes: dict[str, Any] = {"batch": 2, "heads": 3, "queries": 5, "keys": 7, "head_dim": 11, "itemsize": 4}
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, got -1"):
        AttentionShape(**(sizes | {name: -1}))


@pytest.mark.parametrize("itemsize", [0, 1, 3, 16])
def test_an_item_size_of_no_floating_point_dtype_is_refused(itemsize: int) -> None:
    with pytest.raises(ValueError, match=f"itemsize must be 2, 4 or 8 bytes .* got {itemsize}"):
        AttentionShape(2, 3, 5, 7, 11, itemsize)


@pytest.mark.parametrize("key_heads", [0, 2, 5])
def test_key_heads_have_to_divide_the_heads(key_heads: int) -> None:
    with pytest.raises(ValueError, match=f"heads=3 and key_heads={key_heads}"):
        AttentionShape(2, 3, 5, 7, 11, 4, key_heads=key_heads)


def test_a_mask_counts_its_elements_before_broadcasting() -> None:
    assert MaskShape(1, 3, 1, 7).elements == 21


@pytest.mark.parametrize(("warn_only", "expected"), [(False, True), (True, False)])
def test_a_call_knows_that_it_has_to_be_deterministic(warn_only: bool, expected: bool) -> None:
    shape = AttentionShape(2, 3, 5, 7, 11, 2)
    assert not CallSpec.planned(shape, "cuda").deterministic
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert CallSpec.planned(shape, "cuda").deterministic == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("mask", "unaligned"),
    [
        (torch.zeros(1, 1, 67, 64), False),
        (torch.zeros(1, 1, 67, 53), True),
        (torch.zeros(1, 1, 67, 72)[..., :53], False),  # its rows start at multiples of 8 all the same
        (torch.zeros(1, 1, 64, 67).mT, True),
    ],
)
def test_a_mask_tells_whether_its_rows_are_aligned(mask: torch.Tensor, unaligned: bool) -> None:
    query, key = torch.zeros(1, 1, 67, 11), torch.zeros(1, 1, mask.shape[3], 11)
    sizes = attention_sizes(query, key, key, mask, dropout_p=0.0, is_causal=False, upcast=False)
    found = attention_shape(sizes).mask
    assert found is not None
    assert found.unaligned == unaligned
