"""What the plans of every policy have in common."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from slicemod.call import AttentionShape, CallSpec, MaskShape
from slicemod.choose import plan_slices
from slicemod.functional import sliced_attention
from slicemod.kernels.fused.cpu_bytes import cpu_flash_peak
from slicemod.kernels.fused.kernel import fused_peak
from slicemod.kernels.sliced.kernel import SlicedKernel
from slicemod.kernels.sliced.loop import SlicedCall, TurnLoop
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.kernels.sliced.slices import Conditions, Slices
from slicemod.kernels.sliced.tiles import Tiles, heads_at_once
from slicemod.plan import BUFFER_CAPS, NotEnoughMemoryError, SlicePlan
from slicemod.rounding import ceil_div
from tests.kernels.sliced.planned_shapes import budgets, devices, shapes

GIB = 2**30


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("heuristic", r"max approx\. 0x0"),
        ("doggettx", r"max approx\. 0x0"),
        ("invokeai", r"invokeai: needs 512\.0 MiB \(536,870,912 bytes\) and has 0 bytes"),
        ("mps", "mps: needs .* bytes\\) and has 0"),
        ("exact", "exact: needs .* bytes and has 0"),
    ],
)
@pytest.mark.parametrize("free_bytes", [0, -1, -(10**12)])
def test_no_memory_at_all_is_told_in_words(policy: str, words: str, free_bytes: int) -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 40, 4)
    with pytest.raises(NotEnoughMemoryError, match=words) as caught:
        plan_slices(shape, free_bytes, policy=policy)
    assert "1 x 8 heads, 4096 queries by 4096 keys of 40 channels" in str(caught.value)
    assert re.search(r"max approx\. 0x0|no image is small enough", str(caught.value))


@pytest.mark.parametrize("settings", [{"steps": 3}, {"policy": "mps", "device_type": "mps"}])
@pytest.mark.parametrize("free_bytes", [0, -7])
def test_nothing_is_planned_without_memory(settings: dict[str, Any], free_bytes: int) -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"has 0 bytes, for .* Free memory on the device or lower"):
        plan_slices(AttentionShape(1, 2, 67, 53, 11, 4), free_bytes, **settings)


@given(shapes(), budgets, st.sampled_from(list(POLICIES)), devices, st.booleans())
@example(AttentionShape(1, 11, 4887, 4992, 1, 8, key_heads=1), 1, "heuristic", "mps", True)  # 10 heads in a buffer
def test_the_slices_of_every_plan_cover_all_rows_and_heads(
    shape: AttentionShape, free_bytes: int, policy: str, device_type: str, training: bool
) -> None:
    try:
        plan = plan_slices(shape, free_bytes, policy=policy, device_type=device_type, training=training)
    except NotEnoughMemoryError:
        return
    assert 1 <= plan.heads <= shape.batch_heads
    assert 1 <= plan.rows <= shape.queries
    heads, rows = (shape.batch_heads, plan.slice_size) if plan.axis == "query" else (plan.slice_size, shape.queries)
    if device_type in BUFFER_CAPS and policy != "exact" and (plan.heads < heads or plan.rows < rows):
        assert plan.steps <= turns(shape, plan)
        return  # turns of the loop are smaller than the policy's slices
    assert plan.slice_size == (plan.rows if plan.axis == "query" else plan.heads)
    if plan.heads < shape.heads or shape.batch == 1:
        assert plan.steps == turns(shape, plan)
        return
    items = plan.heads // shape.heads  # whole ones, which the loop may compute one after the other
    assert plan.heads == items * shape.heads
    chunks = ceil_div(shape.keys, plan.keys) if plan.keys else 1
    assert plan.steps == ceil_div(shape.batch, items) * ceil_div(shape.queries, plan.rows) * chunks


def turns(shape: AttentionShape, plan: SlicePlan) -> int:
    """How many turns the loop takes for the plan, with a chunk of keys as one."""
    query = torch.empty(shape.batch, shape.heads, shape.queries, shape.head_dim, device="meta")
    key = torch.empty(shape.batch, shape.heads // shape.group, shape.keys, shape.head_dim, device="meta")
    call = SlicedCall(0.0, False, 1.0, False, plan.heads, plan.rows, None, plan.items, plan.keys)
    of_keys = TurnLoop(query, key, key, None, call).key_turns()
    return sum(len(turns) for _, _, turns in of_keys) * (ceil_div(shape.keys, plan.keys) if plan.keys else 1)


def test_a_slice_stays_within_a_batch_item_and_is_counted_so() -> None:
    shape = AttentionShape(2, 8, 577, 577, 40, 4)
    plan = plan_slices(shape, GIB, device_type="cpu")
    assert (plan.axis, plan.slice_size, plan.steps) == ("heads", 6, 4)  # 6 and 2 heads of either item
    assert plan.steps == turns(shape, plan)


def test_invokeais_slices_of_more_than_an_item_are_whole_items() -> None:
    shape = AttentionShape(3, 8, 1024, 1024, 40, 4)  # 96 MiB, in 4 slices of 24 // 4 heads; then in 2
    some = plan_slices(shape, GIB, policy="invokeai", device_type="cpu")
    whole = plan_slices(shape, int(3.3 * 48 * 2**20) + 1, policy="invokeai", device_type="cuda")
    assert (some.axis, some.slice_size, some.steps) == ("heads", 6, 6)
    assert (whole.axis, whole.slice_size, whole.steps) == ("heads", 8, 3)  # of 12, which are no whole items
    assert [turns(shape, plan) for plan in (some, whole)] == [6, 3]


@given(shapes(), budgets, st.sampled_from(list(POLICIES)), devices, st.booleans(), st.booleans())
def test_a_plan_holds_for_its_own_call_to_the_byte(
    shape: AttentionShape, free_bytes: int, policy: str, device_type: str, training: bool, checkpoint: bool
) -> None:
    settings: dict[str, Any] = {"policy": policy, "training": training, "checkpoint": checkpoint}
    try:
        plan = plan_slices(shape, free_bytes, device_type=device_type, **settings)
    except NotEnoughMemoryError:
        return
    call = CallSpec.planned(shape, device_type, training=training)
    assert SlicedKernel().holds(plan, call)
    assert not SlicedKernel().holds(replace(plan, peak_bytes=plan.peak_bytes - 1), call)


@given(shapes(), st.integers(1, 12), st.integers(1, 5000), st.booleans(), st.booleans())
def test_larger_slices_have_larger_peaks(
    shape: AttentionShape, heads: int, rows: int, training: bool, checkpoint: bool
) -> None:
    def peak(heads: int, rows: int) -> int:
        return Tiles(shape, heads_at_once(shape, heads), rows).peak(training=training, checkpoint=checkpoint)

    assert peak(heads, rows) <= peak(heads, rows + 1)
    assert peak(heads, rows) <= peak(heads + 1, rows)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("device_type", ["mps", "xpu"])
def test_no_policy_allocates_a_buffer_above_four_gib(device_type: str, training: bool, policy: str) -> None:
    for shape in (
        AttentionShape(1, 8, 16384, 16384, 40, 4),
        AttentionShape(1, 8, 4096, 1_000_003, 64, 2, upcast=True, mask=MaskShape(1, 1, 4096, 1_000_003, is_bool=True)),
        AttentionShape(2, 20, 65536, 65536, 64, 4),
    ):
        plan = plan_slices(shape, 1000 * GIB, policy=policy, device_type=device_type, training=training)
        given = Conditions(1000 * GIB, device_type, training, checkpoint=True)
        tiles = given.tiles(shape, plan.heads, plan.rows, plan.items, plan.keys)
        assert tiles.workspace(training=training) <= BUFFER_CAPS[device_type]
        assert plan.peak_bytes == tiles.peak(training=training)


def test_a_policy_is_a_function_and_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def row_by_row(shape: AttentionShape, given: Conditions) -> Slices:
        return Slices("query", shape.batch_heads, 1 if given.free_bytes < GIB else 2)

    monkeypatch.setitem(POLICIES, "row_by_row", row_by_row)
    shape = AttentionShape(1, 2, 67, 53, 11, 4)
    assert plan_slices(shape, GIB - 1, policy="row_by_row").steps == 67
    assert plan_slices(shape, GIB, policy="row_by_row").steps == 34
    query = torch.randn(1, 2, 67, 11)
    slicing: Any = {"policy": "row_by_row", "budget": "1MiB", "kernel": "math"}
    expected = sliced_attention(query, query, query, slicing={"kernel": "fused"})
    torch.testing.assert_close(sliced_attention(query, query, query, slicing=slicing), expected)


@pytest.mark.parametrize(("steps", "rows", "taken"), [(1, 67, 1), (2, 34, 2), (3, 23, 3), (60, 2, 34), (1000, 1, 67)])
def test_pinned_steps_are_balanced_rows(steps: int, rows: int, taken: int) -> None:
    plan = plan_slices(AttentionShape(2, 3, 67, 53, 11, 4), 1, steps=steps)
    assert (plan.axis, plan.steps, plan.slice_size, plan.policy) == ("query", taken, rows, "pinned")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_fused_kernel_is_one_step_with_its_own_peak(policy: str, training: bool) -> None:
    shape = AttentionShape(2, 3, 67, 53, 11, 4)
    plan = plan_slices(shape, GIB, policy=policy, device_type="cpu", kernel="fused", training=training)
    assert (plan.steps, plan.kernel, plan.slice_size) == (1, "fused", 67)
    assert plan.peak_bytes == cpu_flash_peak(shape, torch.get_num_threads(), training=training)


def test_a_fused_kernel_on_a_gpu_keeps_row_statistics_and_never_scores() -> None:
    shape = AttentionShape(2, 10, 4096, 4096, 64, 2)
    rows = shape.batch_heads * shape.queries
    inference, training = (CallSpec.planned(shape, "cuda", training=training) for training in (False, True))
    assert rows * 4 <= fused_peak(inference) <= rows * 4 + 2048
    assert rows * 4 < fused_peak(training) < shape.scores_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "greedy"}, "policy: expected one of exact, heuristic, .*; got 'greedy'"),
        ({"kernel": "auto"}, "kernel: expected one of native, .*, math; got 'auto'"),
        ({"steps": 0}, "steps: expected .* 1 or more.*; got 0"),
        ({"steps": 2.5}, "steps: expected a whole number .*; got 2.5"),
        ({"steps": True}, "steps: expected a whole number .*; got True"),
        ({"kernel": "fused", "steps": 3}, "steps: expected none with this kernel"),
        ({"checkpoint": "all"}, "checkpoint: expected true, false or \"layer\"; got 'all'"),
    ],
)
def test_an_unknown_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_slices(AttentionShape(2, 3, 5, 7, 11, 4), GIB, **settings)


@pytest.mark.parametrize("free_bytes", ["1GiB", True, math.inf, math.nan])
def test_free_bytes_that_are_no_finite_number_are_refused(free_bytes: Any) -> None:
    with pytest.raises(TypeError, match=f"free_bytes: expected a finite number of bytes; got {free_bytes!r}"):
        plan_slices(AttentionShape(2, 3, 5, 7, 11, 4), free_bytes)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_nothing_to_attend_to_is_one_step(policy: str, sizes: tuple[int, int, int, int]) -> None:
    assert plan_slices(AttentionShape(*sizes, 11, 4), GIB, policy=policy).steps == 1


def test_a_plan_reads_as_its_slices_bytes_and_policy() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 40, 2)
    rows = plan_slices(shape, GIB, policy="heuristic")
    assert str(rows) == f"math, {rows.steps} x {rows.slice_size} rows, {rows.peak_bytes:,} bytes (heuristic)"
    heads = plan_slices(shape, GIB, policy="invokeai", device_type="cpu")
    assert str(heads) == f"math, 8 x 1 heads, {heads.peak_bytes:,} bytes (invokeai)"
    fused = plan_slices(shape, GIB, kernel="fused")
    assert str(fused) == f"fused, {fused.peak_bytes:,} bytes (exact)"
