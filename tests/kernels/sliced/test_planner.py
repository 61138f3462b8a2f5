"""The policies: worked cases, their rules, and what every plan has in common."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
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
from slicemod.kernels.sliced.exact import CPU_CACHED_SCORES, WIDE_SCORES
from slicemod.kernels.sliced.kernel import SlicedKernel
from slicemod.kernels.sliced.loop import SlicedCall, TurnLoop
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.kernels.sliced.slices import Conditions, Slices
from slicemod.kernels.sliced.tiles import Tiles, heads_at_once
from slicemod.plan import BUFFER_CAPS, NotEnoughMemoryError, SlicePlan
from slicemod.rounding import ceil_div

GIB = 2**30
SIZES = ("batch", "heads", "queries", "keys", "head_dim", "itemsize")
DATA = Path(__file__).parents[2] / "data" / "plans.json"
CASES: list[dict[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))


def describe(case: dict[str, Any]) -> str:
    return "-".join(str(case[name]) for name in ("policy", "device_type", *SIZES, "free_bytes"))


def plan_case(case: dict[str, Any]) -> SlicePlan:
    shape = AttentionShape(*(case[name] for name in SIZES))
    return plan_slices(shape, case["free_bytes"], policy=case["policy"], device_type=case["device_type"])


@pytest.mark.parametrize("case", [case for case in CASES if "error" not in case["expect"]], ids=describe)
def test_worked_plan(case: dict[str, Any]) -> None:
    plan = plan_case(case)
    assert {"axis": plan.axis, "steps": plan.steps, "slice_size": plan.slice_size} == case["expect"]
    assert (plan.policy, plan.kernel) == (case["policy"], "math")


@pytest.mark.parametrize("case", [case for case in CASES if "error" in case["expect"]], ids=describe)
def test_worked_error(case: dict[str, Any]) -> None:
    expect = case["expect"]
    side, need, have = expect["max_resolution"], expect["need_gb"], expect["have_gb"]
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan_case(case)
    assert type(caught.value).__name__ == expect["error"]
    message = str(caught.value)
    assert f"Not enough memory, use lower resolution (max approx. {side}x{side})" in message
    assert f"Need: {need}GB free, Have: {have}GB free" in message


def test_the_worked_cases_cover_each_policy_but_our_own() -> None:
    assert {case["policy"] for case in CASES} == set(POLICIES) - {"exact"}


@pytest.mark.parametrize("policy", ["heuristic", "doggettx"])
@pytest.mark.parametrize("queries", [4080, 4096, 4099, 97])
def test_row_slices_are_balanced_and_uneven_where_they_must_be(policy: str, queries: int) -> None:
    shape = AttentionShape(1, 8, queries, queries, 40, 4)
    free = int(shape.scores_bytes * 2.5 * (3.3 if policy == "heuristic" else 1) / 8) + 1
    plan = plan_slices(shape, free, policy=policy)
    assert (plan.steps, plan.slice_size) == (8, ceil_div(queries, 8))


def test_half_precision_scores_are_taken_threefold_and_others_two_and_a_half_times() -> None:
    half, single = AttentionShape(1, 2, 64, 64, 8, 2), AttentionShape(1, 1, 64, 64, 8, 4)
    assert half.scores_bytes == single.scores_bytes
    for shape, factor in ((half, 3), (single, 2.5)):
        enough = int(shape.scores_bytes * factor)
        assert plan_slices(shape, enough, policy="doggettx").steps == 1
        assert plan_slices(shape, enough - 1, policy="doggettx").steps == 2


def test_upcast_scores_count_as_single_precision() -> None:
    shape = AttentionShape(1, 2, 64, 64, 8, 2, upcast=True)
    assert plan_slices(shape, int(shape.scores_bytes * 2.5), policy="doggettx").steps == 1
    assert plan_slices(shape, int(shape.scores_bytes * 2.5) - 1, policy="doggettx").steps == 2


def test_heuristic_keeps_a_safety_factor_that_doggettx_has_not() -> None:
    shape = AttentionShape(2, 10, 4096, 4096, 64, 2)
    required = shape.scores_bytes * 3
    assert plan_slices(shape, required, policy="doggettx").steps == 1
    assert plan_slices(shape, required, policy="heuristic").steps == 4
    assert plan_slices(shape, int(required * 3.3) + 1, policy="heuristic").steps == 1


def test_heuristic_slices_for_the_cache_of_a_cpu() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 40, 4)  # 512 MiB of scores against 32: div = 1 << bit_length(15)
    assert plan_slices(shape, 10**12, policy="heuristic", device_type="cpu").steps == 16
    assert plan_slices(shape, 10**12, policy="heuristic", device_type="cuda").steps == 1
    assert plan_slices(shape, 10**12, policy="doggettx", device_type="cpu").steps == 1


def test_the_limit_of_64_steps_does_not_count_the_cap_of_a_cpu() -> None:
    shape = AttentionShape(1, 8, 16384, 16384, 40, 4)
    plan = plan_slices(shape, 10**15, policy="heuristic", device_type="cpu")
    assert plan.steps == 256


@pytest.mark.parametrize("policy", ["heuristic", "invokeai", "mps"])
def test_metal_has_one_rule_for_three_policies(policy: str) -> None:
    small, large = AttentionShape(1, 8, 8192, 77, 40, 2), AttentionShape(1, 8, 16384, 16384, 40, 2)
    assert plan_slices(small, 1, policy=policy, device_type="mps").steps == 1
    plan = plan_slices(large, 1, policy=policy, device_type="mps")
    assert (plan.axis, plan.slice_size) == ("query", 8191)  # 2**30 // 2**17 is 8192, a multiple of 4096


def test_metal_slices_have_at_least_one_row() -> None:
    assert plan_slices(AttentionShape(2**20, 8, 1024, 5, 3, 2), 1, policy="mps", device_type="mps").slice_size == 1


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


@st.composite
def shapes(draw: st.DrawFn) -> AttentionShape:
    heads = draw(st.integers(1, 12))
    queries, keys = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    mask = MaskShape(
        1, draw(st.sampled_from([1, heads])), draw(st.sampled_from([1, queries])), keys, draw(st.booleans())
    )
    return AttentionShape(
        draw(st.integers(1, 3)),
        heads,
        queries,
        keys,
        draw(st.integers(1, 160)),
        draw(st.sampled_from([2, 4, 8])),
        key_heads=draw(st.sampled_from([divisor for divisor in range(1, heads + 1) if heads % divisor == 0])),
        upcast=draw(st.booleans()),
        causal=draw(st.booleans()),
        dropout=draw(st.booleans()),
        mask=draw(st.sampled_from([None, mask])),
    )


devices = st.sampled_from(["cuda", "cpu", "mps", "xpu"])
budgets = st.integers(0, 48).map(lambda power: 3**power // 2)


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


@given(shapes(), st.integers(1, 12), st.integers(1, 5000), st.booleans(), st.booleans())
def test_larger_slices_have_larger_peaks(
    shape: AttentionShape, heads: int, rows: int, training: bool, checkpoint: bool
) -> None:
    def peak(heads: int, rows: int) -> int:
        return Tiles(shape, heads_at_once(shape, heads), rows).peak(training=training, checkpoint=checkpoint)

    assert peak(heads, rows) <= peak(heads, rows + 1)
    assert peak(heads, rows) <= peak(heads + 1, rows)


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


def test_weights_that_are_kept_are_one_buffer_too() -> None:
    shape = AttentionShape(1, 8, 16384, 16384, 40, 4)
    settings: dict[str, Any] = {"policy": "exact", "device_type": "mps", "training": True}
    assert plan_slices(shape, 1000 * GIB, **settings).steps > 1
    with pytest.raises(NotEnoughMemoryError, match="Set checkpoint=True"):
        plan_slices(shape, 1000 * GIB, checkpoint=False, **settings)


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


def test_the_error_is_a_runtime_error_as_in_the_webui() -> None:
    assert issubclass(NotEnoughMemoryError, RuntimeError)


def test_powers_of_two_up_to_64() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 40, 4)
    required = shape.scores_bytes * 2.5
    for power in range(7):
        plan = plan_slices(shape, math.ceil(required / 2**power), policy="doggettx")
        assert plan.steps == 2**power
    with pytest.raises(NotEnoughMemoryError):
        plan_slices(shape, math.floor(required / 64) - 1, policy="doggettx")


@pytest.mark.parametrize("free_bytes", [2**18, 2**20, 1_500_007])
def test_as_many_small_items_are_computed_together_as_fit(free_bytes: int) -> None:
    shape = AttentionShape(1021, 7, 17, 13, 41, 4)
    plan, wide = plan_slices(shape, free_bytes), plan_slices(shape, 2**30)
    assert wide.items > plan.items > 1
    assert plan.peak_bytes <= free_bytes
    assert Tiles.of_slice(shape, plan.heads, plan.rows, plan.items + 1).peak(training=False) > free_bytes
