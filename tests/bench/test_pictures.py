"""Pictures: a point for each peer, the frontier of those that none beats, labels that do not overlap."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from slicemod.bench.bench_options import GROWTH_TOKENS
from slicemod.bench.comparing import Setting
from slicemod.bench.pictures import SOURCE, growth, ratios, save_picture, save_pictures, trade_off
from slicemod.user_error import UserError
from tests.bench.tiny import TRAINING, made_up_results, measurement


def test_every_picture_that_there_are_figures_for_is_written(tmp_path: Path) -> None:
    written = save_pictures(made_up_results(), tmp_path / "new")
    names = ["trade-layer.png", "ratios.png", "resolution-layer-float32-inference.png", "growth.png"]
    assert [path.name for path in written] == names
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > 250
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in save_pictures(made_up_results(), tmp_path / "new")] == before


def test_the_frontier_is_of_those_that_no_other_beats() -> None:
    rows = [
        measurement("layer", 64, peer, seconds, peak * 2**20)
        for peer, seconds, peak in (("small", 4.0, 10), ("quick", 1.0, 1000), ("beaten", 4.0, 2000), ("even", 2.0, 100))
    ]
    (axes,) = trade_off(rows).axes
    line = next(line for line in axes.lines if line.get_marker() == "None")
    points: Any = line.get_xydata()
    corners = {(float(peak), float(seconds)) for peak, seconds in points}
    assert {(10, 4.0), (100, 2.0), (1000, 1.0)} <= corners
    assert not any(peak == 2000 for peak, _ in corners)


def test_one_size_makes_no_line(tmp_path: Path) -> None:
    results = made_up_results()
    results.measurements = [row for row in results.measurements if row.size in (512, 1024)]
    assert [path.name for path in save_pictures(results, tmp_path)] == ["trade-layer.png", "ratios.png"]


def test_time_against_memory_has_a_panel_for_each_setting() -> None:
    rows = [measurement("layer", 64, "sdpa", 1.0, 10)]
    rows += [replace(rows[0], setting=TRAINING)]
    assert [axes.get_title("left") for axes in trade_off(rows).axes] == ["float32, inference", "float32, training"]


def test_ratios_have_a_line_for_each_work_and_a_panel_for_each_mode() -> None:
    rows = [measurement(work, 64, "slicemod", seconds, 10) for work, seconds in (("one", 0.05), ("other", 0.2))]
    rows += [replace(rows[0], setting=TRAINING), replace(rows[1], setting=Setting("bfloat16", "inference"))]
    inference, training = ratios(rows).axes
    assert [label.get_text() for label in inference.get_yticklabels()] == ["one", "other"]
    points = [line for line in inference.lines if line.get_marker() in ("o", "s")]
    found = [(line.get_label(), float(np.asarray(line.get_xydata())[0, 0])) for line in points]
    assert found == [("float32", 0.5), ("float32", 2.0), ("bfloat16", 2.0)]
    assert (training.get_title("left"), training.get_xlim()) == ("training", inference.get_xlim())


def test_a_picture_says_which_results_it_shows_and_is_refused_without_any(tmp_path: Path) -> None:
    results = made_up_results()
    save_picture(results, "growth", tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.info[SOURCE] == results.digest
    results.measurements = results.measurements[:3]
    with pytest.raises(UserError, match=r"growth\.png: expected results with the figures for .*'growth'"):
        save_picture(results, "growth", tmp_path / "growth.png")


def test_a_line_that_hardly_rises_looks_flat() -> None:
    rows = [measurement("attention", size, "sdpa", size**2.01, 2000, "tokens") for size in (1024, 2048)]
    low, high = growth(rows).axes[0].get_ylim()
    assert high / low == pytest.approx(4.0)


@pytest.mark.parametrize(("low", "high"), [(4.1, 4.9), (15, 45), (11, 900), (3, 20_000), (0.0013, 0.0031)])
def test_ticks_have_room_and_there_are_some(low: float, high: float) -> None:
    rows = [measurement("layer", 64, "sdpa", 1.0, round(peak * 2**20)) for peak in (low, high)]
    (axes,) = trade_off(rows).axes
    ticks, (left, right) = list(axes.get_xticks()), axes.get_xlim()
    assert 2 <= len(ticks) <= 5
    assert left <= ticks[0] <= ticks[-1] <= right
    assert all(more / less >= (right / left) ** 0.22 for less, more in pairwise(ticks))


@pytest.mark.parametrize("count", [2, 18])
def test_labels_do_not_overlap(count: int) -> None:
    rows = [measurement("layer", 64, f"peer {number}", 1.0 + (number == 1), 10 + number) for number in range(count)]
    figure = trade_off(rows)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()  # lays the labels out
    renderer = canvas.get_renderer()
    # Text's own method: an annotation's includes its line.
    boxes = sorted((Text.get_window_extent(text, renderer) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == count
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))


def test_labels_of_many_sizes_do_not_overlap() -> None:
    rows = [measurement("attention", size, "sdpa", size**2.0, 2000, "tokens") for size in GROWTH_TOKENS]
    figure = growth(rows)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == len(GROWTH_TOKENS)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
