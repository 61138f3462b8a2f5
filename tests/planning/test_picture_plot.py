"""The picture of the whole shows every way, and the largest image of each at the memory that is asked about."""

from __future__ import annotations

from pathlib import Path

import pytest

from slicemod import SliceConfig
from slicemod.planning.picture import picture_planner
from slicemod.planning.picture_kind import PictureKind
from slicemod.planning.picture_model import find_picture_model
from slicemod.planning.picture_plot import plot_largest
from slicemod.planning.picture_report import names_of_ways

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_every_way_and_its_largest_image_is_in_the_picture(device: str, tmp_path: Path) -> None:
    kind = PictureKind(device=device)
    planner = picture_planner(find_picture_model(DIGITS), kind, 2**26, SliceConfig())
    names = names_of_ways("layers")
    plot_largest(planner, names, tmp_path / "plan.svg", "digits")
    drawn = (tmp_path / "plan.svg").read_text()
    largest = {way: planner.largest(way) for way in planner.ways}
    written = ["digits", "64.0 MiB", *(names[way] for way in planner.ways)]
    written += [f"{found.size}: {found.why}" for found in largest.values()]
    for text in written:
        assert f"<!-- {text} -->" in drawn  # matplotlib says so beside the outlines of the letters
    assert (f"<!-- {names['fused']} -->" in drawn) == (device == "cuda")
