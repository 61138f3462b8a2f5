"""Pictures: a point for each peer, the frontier of those that none beats, labels that do not overlap."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from slicemod.bench.pictures import against_resolution, growth, save_pictures, trade_off
from tests.bench.tiny import INFERENCE, made_up_results, measurement


def test_every_picture_that_there_are_figures_for_is_written(tmp_path: Path) -> None:
    written = save_pictures(made_up_results(), tmp_path / "new")
    names = [f"{kind}-float32-inference.png" for kind in ("trade", "resolution", "growth")]
    assert [path.name for path in written] == names
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in save_pictures(made_up_results(), tmp_path / "new")] == before


def test_the_frontier_is_of_those_that_no_other_beats() -> None:
    rows = [
        measurement("layer", 64, peer, seconds, peak)
        for peer, seconds, peak in (("small", 4.0, 10), ("quick", 1.0, 1000), ("beaten", 4.0, 2000), ("even", 2.0, 100))
    ]
    (axes,) = trade_off(rows, INFERENCE).axes
    line = next(line for line in axes.lines if line.get_marker() == "None")
    points: Any = line.get_xydata()
    corners = {(float(peak), float(seconds)) for peak, seconds in points}
    assert {(10, 4.0), (100, 2.0), (1000, 1.0)} <= corners
    assert not any(peak == 2000 for peak, _ in corners)


def test_one_size_makes_no_line() -> None:
    rows = [measurement("layer", 64, "sdpa", 1.0, 10)]
    assert against_resolution(rows, INFERENCE) is None
    assert growth(rows, INFERENCE) is None


@pytest.mark.parametrize("count", [2, 18])
def test_labels_do_not_overlap(count: int) -> None:
    rows = [measurement("layer", 64, f"peer {number}", 1.0 + (number == 1), 10 + number) for number in range(count)]
    figure = trade_off(rows, INFERENCE)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()  # lays the labels out
    renderer = canvas.get_renderer()
    # Text's own method: an annotation's includes its line.
    boxes = sorted((Text.get_window_extent(text, renderer) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == count
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
