"""Tiles: which ones a call needs, and how many bytes they are."""

from __future__ import annotations

import pytest

from slicemod.call import AttentionShape, MaskShape
from slicemod.kernels.sliced.tiles import Tiles, heads_at_once, items_at_once
from slicemod.rounding import ceil_div


@pytest.mark.parametrize(
    ("key_heads", "wanted", "got"),
    [(None, 4, 4), (None, 99, 6), (None, 0, 1), (3, 1, 1), (3, 3, 2), (3, 5, 4), (2, 2, 2), (2, 4, 3), (2, 99, 6)],
)
def test_a_turn_takes_whole_groups_of_heads_or_stays_within_one(key_heads: int | None, wanted: int, got: int) -> None:
    assert heads_at_once(AttentionShape(5, 6, 7, 11, 13, 4, key_heads=key_heads), wanted) == got


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


def test_small_items_are_computed_together_and_large_ones_alone() -> None:
    small, large = AttentionShape(64, 4, 16, 1, 16, 4), AttentionShape(2, 8, 4096, 4096, 40, 4)
    assert items_at_once(small, heads=256, rows=16) == 64
    assert items_at_once(small, heads=4, rows=16) == 1  # a slice of one item
    assert items_at_once(small, heads=256, rows=15) == 1  # not whole
    assert items_at_once(large, heads=16, rows=4096) == 1
