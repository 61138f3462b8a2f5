"""A picture of the peak memory of a step against its resolution."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from slicemod.memory.sizes import size_text
from slicemod.planning.resolutions import HIGHEST_RESOLUTION
from slicemod.planning.step_peaks import StepPlanner, Way

_POINTS_PER_DOUBLING = 24


class _Style(NamedTuple):
    colour: str  # of Okabe and Ito, which remain apart for the colour-blind
    width: float
    label: tuple[float, tuple[int, int]]  # how far along the line, and how many points away from there


_STYLES: dict[Way, _Style] = {
    "fused": _Style("#009E73", 4.5, (0.35, (4, -14))),
    "full attention": _Style("#D55E00", 2, (0.97, (6, -4))),
    "slicemod": _Style("#0072B2", 2, (0.8, (-20, 6))),
}


def plot_peaks(planner: StepPlanner, path: Path, title: str) -> None:
    """Draws a line for each way to compute attention, the memory, and the last resolution at which each way fits.

    Args:
        planner: of the step.
        path: the picture, of a format that matplotlib writes.
        title: above it.
    """
    limits = {way: planner.largest(way) for way in planner.ways}
    first = 4 * planner.resolution_step
    last = min(HIGHEST_RESOLUTION, max(8 * planner.resolution_step, int(1.3 * max(limits.values()))))
    plans = {pixels: planner.plan(pixels).peaks for pixels in _resolutions(first, last, planner.resolution_step)}

    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axhline(planner.memory, color="0.3", linewidth=1, linestyle="--")
    _write(axes, f"{size_text(planner.memory)} of memory", first, planner.memory, (0, 4), "0.3")
    for way, (colour, width, (place, offset)) in _STYLES.items():
        drawn = {pixels: peaks[way].total for pixels, peaks in plans.items() if way in peaks}
        drawn = {pixels: peak for pixels, peak in drawn.items() if peak <= 4 * planner.memory}
        if not drawn:
            continue
        axes.plot(list(drawn), list(drawn.values()), color=colour, linewidth=width, solid_capstyle="round", label=way)
        labelled = list(drawn)[int(place * (len(drawn) - 1))]
        _write(axes, way, labelled, drawn[labelled], offset, colour, weight="bold")
    bottom = axes.get_ylim()[0] / 1.7  # room for the resolutions below the lines
    for pixels in sorted(set(limits.values()) - {0}):
        fitting = [way for way in planner.ways if limits[way] == pixels]
        colour = _STYLES[fitting[-1]].colour
        axes.vlines(pixels, bottom, planner.memory, color=colour, linewidth=1, linestyle=":")
        _write(axes, f"{pixels} x {pixels}", pixels, bottom, (-3, 4), colour, rotation=90, horizontalalignment="right")
    axes.set_ylim(bottom=bottom)
    axes.set_xlim(first, last)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda pixels, _: f"{pixels:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(round(size)).replace(".00", "")))
    axes.set_xlabel("edge of the square image in pixels")
    axes.set_ylabel("predicted peak of the whole step")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _write(axes: Axes, text: str, pixels: int, size: float, offset: tuple[int, int], colour: str, **style: Any) -> None:
    axes.annotate(text, (pixels, size), xytext=offset, textcoords="offset points", color=colour, fontsize=9, **style)


def _resolutions(first: int, last: int, step: int) -> list[int]:
    """Multiples of `step`, about evenly spread over a logarithmic axis."""
    count = round(_POINTS_PER_DOUBLING * math.log2(last / first))
    return sorted({round(first * (last / first) ** (place / count) / step) * step for place in range(count + 1)})
