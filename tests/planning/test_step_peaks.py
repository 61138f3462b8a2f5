"""Plans at every resolution follow from two traces, and say how far each way to compute attention goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slicemod import NotEnoughMemoryError, SliceConfig, SlicePlan
from slicemod.call import CallSpec
from slicemod.choose import choose
from slicemod.kernels.native.build import native_library
from slicemod.plan import ObstacleError
from slicemod.planning.step_peaks import StepPlanner, Way
from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.planning.unets import UnetSource, find_unet

INFERENCE = StepKind(torch.float16, 2, "cuda")
SMALL = UnetSource(
    {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    latent_pixels=8,
    context_tokens=77,
)


def _planner(kind: StepKind = INFERENCE, memory: int = 2**30, **slicing: str) -> StepPlanner:
    return StepPlanner(SMALL, kind, memory, replace(SliceConfig(policy="exact", kernel="math"), **slicing))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "kind", "pixels"),
    [
        ("sd15", INFERENCE, 1536),
        pytest.param("sd15", StepKind(torch.float32, 2, "cpu", training=True), 768, marks=pytest.mark.slow),
        pytest.param("sdxl", StepKind(torch.bfloat16, 1, "cpu"), 4096, marks=pytest.mark.slow),
        ("configs/digits.yaml", StepKind(torch.float32, 3, "mps", training=True, checkpoint_blocks=True), 328),
    ],
)
def test_a_step_between_two_is_the_one_traced_there(model: str, kind: StepKind, pixels: int) -> None:
    source = find_unet(model)
    timeline, calls = StepPlanner(source, kind, 2**30, SliceConfig()).at(pixels)
    traced = trace_step(source, kind, pixels)
    assert calls == list(traced.calls)
    for rows in ("activations", "gradients", "temporaries"):
        assert torch.equal(getattr(timeline, rows), getattr(traced.timeline, rows))


def test_every_layer_has_the_plan_of_the_budget_that_is_left() -> None:
    planner = _planner(memory=2**27)
    plan = planner.plan(1024)
    slicing = SliceConfig(budget=plan.budget, policy="exact", kernel="math")
    assert 0 < plan.budget < 2**27
    for layer in plan.layers:
        assert layer.plan == choose(CallSpec.planned(layer.shape, "cuda"), slicing, plan.budget)
        assert isinstance(layer.plan, SlicePlan)
    assert max(layer.plan.steps for layer in plan.layers if isinstance(layer.plan, SlicePlan)) > 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", ["math", "auto"])
def test_the_step_with_such_plans_fits_and_uses_the_memory(training: bool, kernel: str) -> None:
    planner = _planner(StepKind(torch.float32, 1, "cuda", training), 2**28, kernel=kernel)
    pixels = 768
    peak = planner.plan(pixels).peaks["slicemod"]
    assert peak.total <= 2**28 < planner.plan(pixels).peaks["full attention"].total
    assert planner.fits("slicemod", pixels)


@pytest.mark.parametrize("way", ["full attention", "fused", "slicemod"])
def test_the_largest_resolution_is_the_last_that_fits(way: Way) -> None:
    planner = _planner()
    largest = planner.largest(way)
    assert largest % planner.resolution_step == 0
    assert planner.fits(way, largest)
    assert not planner.fits(way, largest + planner.resolution_step)


def test_slices_reach_as_far_as_the_rest_of_the_step_allows() -> None:
    planner = _planner()
    assert planner.largest("full attention") < planner.largest("slicemod") <= planner.largest("fused")


def test_too_little_memory_for_the_rest_is_an_error_of_every_layer() -> None:
    planner = _planner(memory=2**20)
    plan = planner.plan(2048)
    assert plan.budget < 0
    assert "slicemod" not in plan.peaks
    assert planner.largest("slicemod") == 0
    for layer in plan.layers:
        assert isinstance(layer.plan, NotEnoughMemoryError)
        assert f"got {2**20:,}. Lower the resolution or the batch." in str(layer.plan)


def test_a_policy_that_gives_up_is_an_error_of_its_layer() -> None:
    heuristic = _planner(memory=2**28, policy="heuristic").plan(2048)
    refused = [layer for layer in heuristic.layers if isinstance(layer.plan, NotEnoughMemoryError)]
    assert 0 < len(refused) < len(heuristic.layers)
    assert "Not enough memory" in str(refused[0].plan)
    assert "slicemod" not in heuristic.peaks


def test_mps_plans_without_a_fused_kernel_and_with_its_cap() -> None:
    planner = _planner(StepKind(torch.float16, 2, "mps"), 2**36, kernel="auto")
    assert planner.ways == ("full attention", "slicemod")
    at_cap = planner.largest("full attention")
    assert planner.plan(at_cap).layers[0].shape.scores_bytes <= 2**32
    assert planner.plan(at_cap + planner.resolution_step).layers[0].shape.scores_bytes > 2**32
    assert planner.plan(at_cap + planner.resolution_step).peaks["full attention"].total < 2**36


def test_scores_of_an_upcasting_model_are_twice_as_large() -> None:
    upcasting = SMALL._replace(config={**SMALL.config, "upcast_attention": True})
    plain, upcast = (
        StepPlanner(source, INFERENCE, 2**30, SliceConfig()).plan(1024).peaks for source in (SMALL, upcasting)
    )
    assert upcast["full attention"].attention == 2 * plain["full attention"].attention
    assert upcast["slicemod"] == plain["slicemod"]


def test_a_unet_without_attention_has_the_same_peak_for_every_way() -> None:
    config = {
        **SMALL.config,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    }
    plan = StepPlanner(SMALL._replace(config=config), INFERENCE, 2**30, SliceConfig()).plan(512)
    assert plan.layers == ()
    assert set(plan.peaks) == {"full attention", "fused", "slicemod"}
    assert len(set(plan.peaks.values())) == 1


@pytest.mark.skipif(native_library() is None, reason="needs the native library")
def test_an_image_that_a_kernel_cannot_run_does_not_fit_and_is_refused_if_it_is_asked_for() -> None:
    planner = _planner(StepKind(torch.float32, 1, "cpu", training=True), 2**20, kernel="native")
    assert planner.largest("slicemod") == 0  # which tries images so small that a layer has one key
    with pytest.raises(ObstacleError, match="one key"):
        planner.plan(planner.resolution_step)


def test_what_slicemods_kernel_cannot_run_other_ways_can() -> None:
    kind = StepKind(torch.float32, 1, "cpu", training=True)
    smallest = SMALL.resolution_step  # a layer has one key there
    needed = _planner(kind).plan(smallest).peaks["full attention"].total
    planner = _planner(kind, needed, kernel="native")
    assert not planner.fits("slicemod", smallest)
    assert planner.fits("full attention", smallest)
