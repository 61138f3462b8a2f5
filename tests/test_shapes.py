"""AttentionShape and Tiles: sizes and byte formulas."""

from __future__ import annotations

from typing import Any

import pytest

from slicemod.shapes import AttentionShape, MaskShape, Tiles, ceil_div, square_resolution


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


@pytest.mark.parametrize(
    ("key_heads", "wanted", "got"),
    [(None, 4, 4), (None, 99, 6), (None, 0, 1), (3, 1, 1), (3, 3, 2), (3, 5, 4), (2, 2, 2), (2, 4, 3), (2, 99, 6)],
)
def test_a_turn_takes_whole_groups_of_heads_or_stays_within_one(key_heads: int | None, wanted: int, got: int) -> None:
    assert AttentionShape(5, 6, 7, 11, 13, 4, key_heads=key_heads).heads_at_once(wanted) == got


PLAIN = AttentionShape(2, 6, 67, 53, 11, 4)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (PLAIN, {"query", "scores"}),
        (AttentionShape(2, 6, 67, 53, 11, 4, causal=True), {"query", "scores", "mask"}),
        (AttentionShape(2, 6, 67, 53, 11, 4, dropout=True), {"query", "scores", "dropout"}),
        (AttentionShape(2, 6, 67, 53, 11, 4, key_heads=2), {"query", "scores", "output"}),
        (AttentionShape(2, 6, 67, 53, 11, 2, upcast=True), {"query", "scores", "output", "key", "value"}),
        (AttentionShape(2, 6, 67, 53, 11, 4, irregular=True), {"query", "scores", "key", "value"}),
        (AttentionShape(2, 6, 67, 53, 11, 4, mask=MaskShape(1, 1, 67, 53)), {"query", "scores", "row_maximum"}),
        (
            AttentionShape(2, 6, 67, 53, 11, 4, mask=MaskShape(1, 1, 67, 53, is_bool=True)),
            {"query", "scores", "row_maximum", "mask"},
        ),
    ],
)
def test_a_call_has_the_tiles_that_it_needs_and_no_others(shape: AttentionShape, names: set[str]) -> None:
    assert {name for name, size in Tiles(shape, 3, 5).forward.items() if size} == names


def test_tiles_start_at_whole_cache_lines() -> None:
    sizes = Tiles(PLAIN, 3, 5).forward | Tiles(PLAIN, 3, 5).backward
    assert all(size % 16 == 0 for size in sizes.values())
    assert sizes["scores"] == ceil_div(3 * 5 * 53, 16) * 16


@pytest.mark.parametrize("checkpoint", [True, False])
def test_training_needs_more_than_inference(checkpoint: bool) -> None:
    tiles = Tiles(PLAIN, 3, 5)
    assert tiles.peak(training=True, checkpoint=checkpoint) > tiles.peak(training=False, checkpoint=checkpoint)


def test_without_checkpoint_all_weights_are_counted() -> None:
    tiles = Tiles(PLAIN, 3, 5)
    kept = tiles.peak(training=True, checkpoint=False) - tiles.peak(training=True, checkpoint=True)
    assert kept == PLAIN.scores_bytes


def test_a_tile_follows_the_mask_before_broadcasting() -> None:
    per_head = MaskShape(2, 6, 1, 53, is_bool=True)
    per_row = MaskShape(1, 1, 67, 53, is_bool=True)
    assert Tiles(AttentionShape(2, 6, 67, 53, 11, 4, mask=per_head), 3, 5).mask == 3 * 53
    assert Tiles(AttentionShape(2, 6, 67, 53, 11, 4, mask=per_row), 3, 5).mask == 5 * 53


@pytest.mark.parametrize(("size", "parts", "expected"), [(7, 2, 4), (8, 2, 4), (1, 3, 1), (0, 3, 0)])
def test_ceil_div_rounds_up(size: int, parts: int, expected: int) -> None:
    assert ceil_div(size, parts) == expected


@pytest.mark.parametrize(
    ("available", "expected"), [(0.0, 0), (-1e9, 0), (2.5 * 64**4, 512), (2.5 * 64**4 - 1, 448), (2.5 * 128**4, 1024)]
)
def test_square_resolution_is_that_of_the_webui(available: float, expected: int) -> None:
    assert square_resolution(available, 2.5) == expected


def test_small_items_are_computed_together_and_large_ones_alone() -> None:
    small, large = AttentionShape(64, 4, 16, 1, 16, 4), AttentionShape(2, 8, 4096, 4096, 40, 4)
    assert small.items_at_once(heads=256, rows=16) == 64
    assert small.items_at_once(heads=4, rows=16) == 1  # a slice of one item
    assert small.items_at_once(heads=256, rows=15) == 1  # not whole
    assert large.items_at_once(heads=16, rows=4096) == 1
