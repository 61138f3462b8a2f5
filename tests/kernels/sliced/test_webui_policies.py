"""The policies of the webui: worked cases, their rules, and the arithmetic that they share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from slicemod.call import AttentionShape
from slicemod.choose import plan_slices
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.kernels.sliced.webui_policies import square_resolution
from slicemod.plan import NotEnoughMemoryError, SlicePlan
from slicemod.rounding import ceil_div

SIZES = ("batch", "heads", "queries", "keys", "head_dim", "itemsize")
DATA = Path(__file__).parents[2] / "data" / "plans.json"
CASES: list[dict[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("available", "expected"), [(0.0, 0), (-1e9, 0), (2.5 * 64**4, 512), (2.5 * 64**4 - 1, 448), (2.5 * 128**4, 1024)]
)
def test_square_resolution_is_that_of_the_webui(available: float, expected: int) -> None:
    assert square_resolution(available, 2.5) == expected


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
