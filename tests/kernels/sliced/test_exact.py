"""The policy `exact`: as few slices as fit, as large as run at full speed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slicemod.call import AttentionShape, MaskShape
from slicemod.choose import plan_slices
from slicemod.kernels.sliced.exact import CPU_CACHED_SCORES, WIDE_SCORES
from slicemod.kernels.sliced.slices import Conditions
from slicemod.kernels.sliced.tiles import Tiles, heads_at_once
from slicemod.plan import NotEnoughMemoryError
from slicemod.rounding import ceil_div
from tests.kernels.sliced.planned_shapes import budgets, devices, shapes

GIB = 2**30


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", [{}, {"upcast": True}, {"mask": MaskShape(1, 1, 4096, 4096, is_bool=True)}])
def test_exact_says_what_it_needs_what_there_is_and_what_would_fit(settings: dict[str, Any], training: bool) -> None:
    shape = AttentionShape(2, 8, 4096, 4096, 40, 2 if "upcast" in settings else 4, **settings)
    least = Tiles.of_slice(shape, 1, 1, keys=1).peak(training=training)
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan_slices(shape, least - 1, policy="exact", training=training)
    message = str(caught.value)
    assert f"{least:,} bytes" in message.split(" and has ")[0]
    assert f"{least - 1:,} bytes" in message.split(" and has ")[1]
    assert "Raise the budget or lower the resolution" in message
    found = re.search(r"at most about (\d+)x", message)
    side = int(found[1]) if found else 0
    if side:
        assert plan_slices(shape.at_side(side), least - 1, policy="exact", training=training).keys
    with pytest.raises(NotEnoughMemoryError):
        plan_slices(shape.at_side(side + 64), least - 1, policy="exact", training=training)
    assert plan_slices(shape, least, policy="exact", training=training).peak_bytes == least


@pytest.mark.parametrize(
    ("checkpoint", "advice"), [(False, "Set checkpoint=True, raise"), (True, "Raise the budget or")]
)
def test_exact_names_the_knob_that_would_help(checkpoint: bool, advice: str) -> None:
    shape = AttentionShape(2, 8, 512, 512, 40, 4)
    with pytest.raises(NotEnoughMemoryError, match=advice):
        plan_slices(shape, 500, policy="exact", training=True, checkpoint=checkpoint)


@given(shapes(), budgets, devices, st.booleans(), st.booleans())
def test_an_exact_plan_fits_its_budget(
    shape: AttentionShape, free_bytes: int, device_type: str, training: bool, checkpoint: bool
) -> None:
    given = Conditions(free_bytes, device_type, training, checkpoint)
    least = min(
        given.peak(given.tiles(shape, 1, 1, keys=keys)) for keys in ((0,) if training and not checkpoint else (0, 1))
    )
    settings: dict[str, Any] = {"policy": "exact", "training": training, "checkpoint": checkpoint}
    if free_bytes < least:
        with pytest.raises(NotEnoughMemoryError):
            plan_slices(shape, free_bytes, device_type=device_type, **settings)
    else:
        assert plan_slices(shape, free_bytes, device_type=device_type, **settings).peak_bytes <= free_bytes


@given(shapes(), st.integers(10_000, 10**9), st.booleans())
@example(AttentionShape(1, 2, 4096, 77, 40, 4), 1_284_959, False)  # 1,366 rows fit: 3 slices
def test_exact_has_the_fewest_slices_that_fit(shape: AttentionShape, free_bytes: int, training: bool) -> None:
    try:
        plan = plan_slices(shape, free_bytes, policy="exact", training=training)
    except NotEnoughMemoryError:
        return
    if plan.steps == 1 or plan.heads < shape.batch_heads or plan.keys:
        return
    rows = ceil_div(shape.queries, plan.steps - 1)
    if rows * shape.keys * heads_at_once(shape, plan.heads) * shape.score_itemsize > WIDE_SCORES:
        return  # larger slices are no faster
    assert Tiles(shape, heads_at_once(shape, plan.heads), rows).peak(training=training) > free_bytes


@given(shapes(), st.integers(10_000, 10**9), st.integers(10_000, 10**9), devices, st.booleans())
@example(AttentionShape(1, 2, 11, 2289, 105, 4, key_heads=1), 10_000, 10_064, "cpu", False)
@example(AttentionShape(1, 7, 65, 31, 11, 2, key_heads=1), 10_000, 10_192, "cuda", False)  # 5 heads, or 6
def test_more_memory_never_means_more_slices(
    shape: AttentionShape, one: int, other: int, device_type: str, training: bool
) -> None:
    try:
        tight, wide = (
            plan_slices(shape, free, policy="exact", device_type=device_type, training=training)
            for free in sorted((one, other))
        )
    except NotEnoughMemoryError:
        return
    if tight.keys or wide.keys:
        return  # chunks of keys or rows are taken for their speed, whichever are fewer
    if device_type == "cpu" and wide.heads != tight.heads:
        return  # a CPU works best on few heads with many rows, though that may be more slices
    assert wide.steps <= tight.steps
    if (tight.axis, tight.heads, tight.keys) == (
        wide.axis,
        wide.heads,
        wide.keys,
    ):  # as few whole heads may take less than rows of all
        assert wide.peak_bytes >= tight.peak_bytes


@given(shapes(), st.floats(0.01, 1), devices, st.booleans())
def test_exact_slices_use_most_of_the_budget(
    shape: AttentionShape, share: float, device_type: str, training: bool
) -> None:
    whole = Tiles.of_slice(shape, shape.batch_heads, shape.queries)
    free_bytes = int(whole.peak(training=training) * share)
    try:
        plan = plan_slices(shape, free_bytes, policy="exact", device_type=device_type, training=training)
    except NotEnoughMemoryError:
        return
    enough = CPU_CACHED_SCORES if device_type == "cpu" else WIDE_SCORES
    cached = 2 * whole.scores * shape.score_itemsize > enough
    if shape.group == 1 and plan.steps > 1 and plan.rows >= 5 and free_bytes > 8192 and not cached:
        one_head_more = Tiles.of_slice(shape, plan.heads + 1, plan.rows).peak(training=training)
        whole_heads = plan.rows == shape.queries and one_head_more > free_bytes
        assert whole_heads or plan.peak_bytes >= 0.8 * free_bytes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("budget", [10**power for power in range(4, 9)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_slices_of_a_unet_use_most_of_any_budget(itemsize: int, budget: int, device_type: str, training: bool) -> None:
    shape = AttentionShape(2, 8, 16384, 16384, 40, itemsize, upcast=device_type == "cpu")
    try:
        plan = plan_slices(shape, budget, policy="exact", device_type=device_type, training=training)
    except NotEnoughMemoryError:
        assert (training, itemsize) == (True, 2)
        assert budget < 16384 * 2 * 40 * 4 + 10_000  # gradients of a head's keys and values are summed in float32
        return
    assert plan.peak_bytes <= budget
    if plan.rows > 1 and budget < (CPU_CACHED_SCORES if device_type == "cpu" else WIDE_SCORES):  # more is no faster
        assert plan.peak_bytes >= 0.8 * budget


def test_keys_are_chunked_where_few_rows_fit() -> None:
    shape = AttentionShape(1, 8, 16384, 16384, 40, 4)
    rows = plan_slices(shape, 2 * 2**20, policy="exact", device_type="cpu")
    assert (rows.keys, rows.heads) == (0, 1)
    chunks = plan_slices(shape, 2**18, policy="exact", device_type="cpu")
    assert 0 < chunks.keys < 16384
    assert chunks.rows > 16
    assert str(chunks).startswith(f"math, {chunks.steps} x {chunks.rows} rows by {chunks.keys} keys, ")


def test_chunks_have_fewer_rows_where_many_leave_no_memory_for_keys() -> None:
    shape = AttentionShape(1, 2, 11, 2289, 105, 4, key_heads=1)
    plan = plan_slices(shape, 10_064, device_type="cpu")  # 11 rows of query and output leave room for 11 keys
    assert (plan.rows, plan.steps) == (5, 54)
    assert plan.peak_bytes <= 10_064


@pytest.mark.parametrize("heads", [1, 8, 20])
@pytest.mark.parametrize("training", [False, True])
def test_a_wide_device_gets_square_chunks_of_all_heads_and_no_more_than_keeps_it_busy(
    heads: int, training: bool
) -> None:
    shape = AttentionShape(2, heads, 16384, 16384, 40, 2, upcast=True)
    plan = plan_slices(shape, 8 * GIB, training=training)
    assert (plan.heads, plan.kernel) == (shape.batch_heads, "math")
    assert 0.8 < plan.rows / plan.keys < 1.25
    assert 0.8 * WIDE_SCORES < heads * plan.rows * plan.keys * 4 <= WIDE_SCORES
    sums = 2 * heads * 16384 * 40 * 4 if training else 0  # the gradients of an item's keys and values
    assert plan.peak_bytes - sums < 3 * WIDE_SCORES


def test_weights_that_are_kept_need_all_keys() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 40, 4)
    assert plan_slices(shape, 8 * GIB, training=True).keys
    assert not plan_slices(shape, 8 * GIB, training=True, checkpoint=False).keys


def test_chunks_of_half_precision_are_summed_in_single() -> None:
    shape = AttentionShape(1, 8, 16384, 16384, 40, 2)
    assert plan_slices(shape, 2**14, policy="exact", device_type="cpu").upcast
    assert not plan_slices(shape, 2**22, policy="exact", device_type="cpu").upcast


def test_weights_that_are_kept_are_one_buffer_too() -> None:
    shape = AttentionShape(1, 8, 16384, 16384, 40, 4)
    settings: dict[str, Any] = {"policy": "exact", "device_type": "mps", "training": True}
    assert plan_slices(shape, 1000 * GIB, **settings).steps > 1
    with pytest.raises(NotEnoughMemoryError, match="Set checkpoint=True"):
        plan_slices(shape, 1000 * GIB, checkpoint=False, **settings)


def test_a_small_call_is_one_step() -> None:
    shape = AttentionShape(2, 10, 4096, 77, 64, 4)
    plan = plan_slices(shape, 100 * GIB, policy="exact")
    assert (plan.steps, plan.slice_size) == (1, 4096)


def test_on_a_cpu_exact_slices_stay_in_the_cache() -> None:
    shape = AttentionShape(2, 10, 4096, 4096, 64, 4)
    plan = plan_slices(shape, 100 * GIB, policy="exact", device_type="cpu")
    assert plan.heads * plan.rows * 4096 * 4 <= 8 * 2**20


@pytest.mark.parametrize("device_type", ["mps", "xpu"])
def test_no_exact_slice_is_a_buffer_above_four_gib(device_type: str) -> None:
    shape = AttentionShape(2, 10, 16384, 16384, 64, 4)
    plan = plan_slices(shape, 1000 * GIB, policy="exact", device_type=device_type)
    assert heads_at_once(shape, plan.heads) * plan.rows * (plan.keys or 16384) * 4 <= 4 * GIB
    assert plan.steps > 1


@pytest.mark.parametrize("free_bytes", [2**18, 2**20, 1_500_007])
def test_as_many_small_items_are_computed_together_as_fit(free_bytes: int) -> None:
    shape = AttentionShape(1021, 7, 17, 13, 41, 4)
    plan, wide = plan_slices(shape, free_bytes), plan_slices(shape, 2**30)
    assert wide.items > plan.items > 1
    assert plan.peak_bytes <= free_bytes
    assert Tiles.of_slice(shape, plan.heads, plan.rows, plan.items + 1).peak(training=False) > free_bytes
