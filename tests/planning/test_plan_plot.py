"""The picture shows every way that can be planned, and where each stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slicemod import SliceConfig
from slicemod.planning.plan_plot import plot_peaks
from slicemod.planning.step_peaks import StepPlanner
from slicemod.planning.unet_step import StepKind
from slicemod.planning.unets import find_unet

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


@pytest.mark.parametrize("device_type", ["cuda", "mps"])
def test_lines_limits_and_memory_are_in_the_picture(device_type: str, tmp_path: Path) -> None:
    kind = StepKind(torch.float32, 1, device_type, training=True)
    planner = StepPlanner(find_unet(DIGITS), kind, 2**27, SliceConfig(policy="exact", kernel="math"))
    plot_peaks(planner, tmp_path / "plan.svg", "digits, training")
    drawn = (tmp_path / "plan.svg").read_text()
    written = [*planner.ways, "128.0 MiB of memory", "digits, training"]
    written += [f"{planner.largest(way)} x {planner.largest(way)}" for way in planner.ways]
    for text in written:
        assert f"<!-- {text} -->" in drawn  # matplotlib says so beside the outlines of the letters
    assert ("<!-- fused -->" in drawn) == (device_type == "cuda")
