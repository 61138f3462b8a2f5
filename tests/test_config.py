"""SliceConfig: its fields, and the plan that it answers a call with."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from slicemod.call import AttentionShape, CallSpec, Layout
from slicemod.choose import choose, plan_slices
from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.kernels.fused.kernel import fused_peak
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.kernels.sliced.slices import Conditions, Slices
from slicemod.memory.budget import Budget
from slicemod.plan import NotEnoughMemoryError, SlicePlan

CPU = torch.device("cpu")
SHAPE = AttentionShape(2, 3, 1031, 1013, 11, 8)  # which PyTorch's kernel computes, and the native one does not


def call_of(shape: AttentionShape = SHAPE, *, training: bool = False, fuses: bool = True) -> CallSpec:
    """A float64 call on the CPU, whose layout keeps PyTorch from fusing it where that is wanted."""
    threads = torch.get_num_threads()
    return CallSpec(shape, torch.float64, CPU, training, layout=Layout(contiguous=fuses), threads=threads)


def plan(slicing: SliceConfig, shape: AttentionShape = SHAPE, **more: bool) -> SlicePlan:
    """The plan for what is free now."""
    return choose(call_of(shape, **more), slicing, slicing.parsed_budget.bytes_on(CPU))


def test_the_default_is_exact_on_free_memory_with_recomputed_slices() -> None:
    expected = {
        "budget": "auto",
        "policy": "exact",
        "kernel": "auto",
        "steps": None,
        "checkpoint": True,
        "upcast": False,
    }
    assert SliceConfig().as_dict() == expected
    assert [field.name for field in dataclasses.fields(SliceConfig) if field.init] == list(expected)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("budget", "a lot", '"512MiB"'),
        ("budget", 0, '"512MiB"'),
        ("budget", 1.5, "a fraction"),
        ("policy", "greedy", "exact, heuristic, doggettx, invokeai, mps"),
        ("kernel", "flash", "auto, native, fused-float32, fused, triton, math"),
        ("steps", 0, "1 or more, or None"),
        ("steps", -3, "1 or more, or None"),
        ("steps", 2.0, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", "4", "a whole number"),
        ("checkpoint", 1, 'true, false or "layer"'),
        ("checkpoint", "block", 'true, false or "layer"'),
        ("upcast", "yes", "true or false"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_was_expected_and_what_came(
    field: str, value: object, expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        SliceConfig.of({field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: expected")
    assert expected in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize("value", [[], {}, ["heuristic"]])
@pytest.mark.parametrize("field", ["policy", "kernel", "budget"])
def test_a_list_or_a_table_in_the_place_of_a_word_is_refused_alike(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        SliceConfig.of({field: value})


def test_steps_cannot_be_pinned_for_a_fused_kernel() -> None:
    with pytest.raises(ValueError, match='got steps=3 with kernel="fused"'):
        SliceConfig(steps=3, kernel="fused")


def test_of_takes_a_config_a_dict_or_nothing() -> None:
    slicing = SliceConfig(budget="64MiB", policy="exact")
    assert SliceConfig.of(slicing) is slicing
    assert SliceConfig.of({"budget": "64MiB", "policy": "exact"}) == slicing
    assert SliceConfig.of(slicing.as_dict()) == slicing
    assert SliceConfig.of(None) == SliceConfig.of({}) == SliceConfig()


def test_the_config_of_a_dict_is_made_once_and_tells_one_byte_from_all_there_is() -> None:
    assert SliceConfig.of({"budget": 1}) is SliceConfig.of({"budget": 1})
    assert SliceConfig.of({"budget": 1}) != SliceConfig.of({"budget": 1.0})
    assert SliceConfig.of({"budget": 1.0}).parsed_budget == Budget(share=1.0)


def test_of_names_an_unknown_key_and_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"budget, policy, kernel, steps, checkpoint, upcast; got 'chunks'"):
        SliceConfig.of({"budget": "64MiB", "chunks": 4})


@pytest.mark.parametrize("slicing", ["exact", 4, ["exact"]])
def test_of_refuses_what_is_no_mapping(slicing: Any) -> None:
    with pytest.raises(TypeError, match=f"got {type(slicing).__name__}"):
        SliceConfig.of(slicing)


def test_a_config_cannot_be_changed_and_can_be_a_key() -> None:
    slicing = SliceConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        slicing.steps = 2  # type: ignore[misc]
    assert hash(slicing) == hash(SliceConfig())


def test_a_config_reads_as_its_main_fields_and_what_differs_from_the_default() -> None:
    assert str(SliceConfig()) == "budget='auto', policy='exact', kernel='auto'"
    assert str(SliceConfig(steps=3, upcast=True)).endswith("kernel='auto', steps=3, upcast=True")


def test_auto_takes_the_fused_kernel_where_one_runs() -> None:
    assert plan(SliceConfig(budget="64MiB")).kernel == "fused"


def test_auto_slices_where_no_fused_kernel_runs() -> None:
    assert plan(SliceConfig(budget="64MiB", policy="exact"), fuses=False).kernel == "math"


def test_auto_slices_where_the_fused_kernel_does_not_fit() -> None:
    fused = fused_peak(call_of())
    assert plan(SliceConfig(budget=fused, policy="exact")).kernel == "fused"
    sliced = plan(SliceConfig(budget=fused - 1, policy="exact"))
    assert sliced.kernel == "math"
    assert sliced.peak_bytes < fused


def test_math_slices_even_where_a_fused_kernel_runs() -> None:
    assert plan(SliceConfig(budget="64MiB", policy="exact", kernel="math")).kernel == "math"


def test_pinned_steps_are_computed_by_the_sliced_kernel() -> None:
    pinned = plan(SliceConfig(budget="64MiB", steps=5))
    assert (pinned.kernel, pinned.steps, pinned.policy) == ("math", 5, "pinned")


def test_fused_raises_where_none_runs_and_says_why() -> None:
    with pytest.raises(ValueError, match='kernel="fused"; fused kernels want the last dimension') as caught:
        plan(SliceConfig(budget="64MiB", kernel="fused"), fuses=False)
    assert 'Take kernel="auto"' in str(caught.value)


def test_fused_raises_where_it_does_not_fit() -> None:
    fused = fused_peak(call_of())
    with pytest.raises(NotEnoughMemoryError, match=f"{fused:,} bytes.* and has .*{fused - 1:,}"):
        plan(SliceConfig(budget=fused - 1, kernel="fused"))


@pytest.mark.parametrize("budget", ["auto", 99_999])
@pytest.mark.parametrize("more", [{"policy": "mps"}, {"policy": "invokeai"}, {"steps": 2}], ids=str)
def test_a_budget_is_a_promise_also_for_policies_that_do_not_look_at_it(
    more: dict[str, Any], budget: Any, free_bytes: list[int]
) -> None:
    free_bytes.append(99_999)
    shape, slicing = dataclasses.replace(SHAPE, keys=SHAPE.queries), SliceConfig(budget=budget, **more)
    with pytest.raises(NotEnoughMemoryError, match=r"the plan math, .*: needs .* and has 97\.7 KiB \(99,999") as caught:
        plan(slicing, shape, fuses=False)
    found = re.search(r"at most about (\d+)x", str(caught.value))
    side = int(found[1]) if found else 0
    if side:
        assert plan(slicing, shape.at_side(side), fuses=False).peak_bytes <= 99_999
    with pytest.raises(NotEnoughMemoryError):
        plan(slicing, shape.at_side(side + 64), fuses=False)


def test_a_fraction_is_of_the_free_memory(free_bytes: list[int]) -> None:
    slicing = SliceConfig(budget=0.5, policy="exact", kernel="math")
    free_bytes.append(2 * 10**6)
    assert plan(slicing) == plan(SliceConfig(budget=10**6, policy="exact", kernel="math"))


def test_free_memory_is_read_anew_for_every_plan(free_bytes: list[int]) -> None:
    slicing = SliceConfig(policy="exact", kernel="math")
    free_bytes.append(10**6)
    tight = plan(slicing)
    free_bytes.append(3 * 10**5)
    assert plan(slicing).steps > tight.steps


def test_upcast_widens_the_scores_of_the_plan() -> None:
    shape = dataclasses.replace(SHAPE, itemsize=2)
    settings: dict[str, Any] = {"budget": "64MiB", "kernel": "math", "steps": 4}
    plain, upcast = plan(SliceConfig(**settings), shape), plan(SliceConfig(**settings, upcast=True), shape)
    assert (plain.upcast, upcast.upcast) == (False, True)
    assert upcast.peak_bytes > plain.peak_bytes


def test_checkpoint_reaches_the_plan() -> None:
    settings: dict[str, Any] = {"budget": "1GiB", "kernel": "math", "steps": 4}
    kept = plan(SliceConfig(**settings, checkpoint=False), training=True)
    recomputed = plan(SliceConfig(**settings), training=True)
    assert (kept.checkpoint, recomputed.checkpoint) == (False, True)
    assert kept.peak_bytes - recomputed.peak_bytes == SHAPE.scores_bytes


def test_the_plan_is_that_of_plan_slices() -> None:
    asked = plan(SliceConfig(budget="1MiB", policy="exact", kernel="math"), training=True)
    assert asked == plan_slices(SHAPE, 2**20, policy="exact", device_type="cpu", training=True)


def test_a_resolved_config_has_the_bytes_that_are_free_now(free_bytes: list[int]) -> None:
    free_bytes.append(10**6)
    slicing = SliceConfig(budget=0.25, policy="exact", steps=None, upcast=True)
    resolved = slicing.resolved("cpu")
    free_bytes.append(10**3)
    assert resolved == dataclasses.replace(slicing, budget=250_000)


def test_nothing_free_cannot_be_resolved(free_bytes: list[int]) -> None:
    free_bytes.append(0)
    with pytest.raises(NotEnoughMemoryError, match="budget: 'auto' needs free memory on cpu; got 0 bytes"):
        SliceConfig().resolved("cpu")


RANK = """
import sys
from torch import distributed
from slicemod import SliceConfig
from slicemod.memory.free_memory import PROBES, MemoryProbe
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
PROBES["cpu"] = MemoryProbe(lambda device: (3_000_000, 1_000_000)[rank])
print(SliceConfig(budget=0.5).resolved("cpu").budget, SliceConfig(budget="2MiB").resolved("cpu").budget)
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs PyTorch's gloo")
def test_every_rank_takes_the_budget_of_the_smallest(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    answers = [rank.communicate(timeout=100)[0].decode().split() for rank in ranks]
    assert [words[-2:] for words in answers] == [["500000", str(2 * 2**20)]] * 2  # before them an older Gloo greets


def test_a_plan_is_looked_for_once_and_the_free_memory_read_each_time(
    free_bytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counting(shape: AttentionShape, given: Conditions) -> Slices:
        asked.append(given.free_bytes)
        return POLICIES["exact"](shape, given)

    monkeypatch.setitem(POLICIES, "counting", counting)
    slicing = SliceConfig.of({"policy": "counting", "kernel": "math"})
    query = torch.randn(1, 2, 67, 11)
    for free in (10**6, 10**6, 2 * 10**6, 10**6):
        free_bytes.append(free)
        sliced_attention(query, query, query, slicing=slicing)
    assert asked == [10**6, 2 * 10**6]


def test_configs_of_one_byte_and_of_all_there_is_differ() -> None:
    byte, everything = SliceConfig(budget=1), SliceConfig(budget=1.0)
    assert byte != everything
    assert hash(byte) != hash(everything)
    assert (byte.parsed_budget, everything.parsed_budget) == (Budget(bytes=1), Budget(share=1.0))


def test_a_replaced_budget_is_parsed_anew_and_no_file_has_the_parsed_one() -> None:
    slicing = dataclasses.replace(SliceConfig(budget="2MiB", steps=7), budget="3KiB")
    assert slicing.parsed_budget == Budget(bytes=3072)
    assert slicing.as_dict()["budget"] == "3KiB"
    assert SliceConfig.of(slicing.as_dict()) == slicing
    with pytest.raises(ValueError, match="got 'parsed_budget'"):
        SliceConfig.of({"parsed_budget": Budget(bytes=5)})


def test_a_budget_of_one_byte_is_not_one_of_all_there_is(free_bytes: list[int]) -> None:
    query = torch.randn(1, 2, 67, 11)
    sliced_attention(query, query, query, slicing=SliceConfig(budget=1.0, policy="exact", kernel="math"))
    with pytest.raises(NotEnoughMemoryError, match="has 1 bytes, for"):
        sliced_attention(query, query, query, slicing=SliceConfig(budget=1, policy="exact", kernel="math"))
