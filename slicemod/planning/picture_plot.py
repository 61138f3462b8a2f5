"""A picture of the largest image against the memory of the device."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from slicemod.memory.sizes import size_text
from slicemod.planning.picture_peaks import Largest, PicturePlanner
from slicemod.planning.step_peaks import Way

_DOUBLINGS = 2  # of the memory, to either side of the one that is asked about
_POINTS_PER_DOUBLING = 3
# Of Okabe and Ito, which remain apart for the colour-blind.
_COLOURS: dict[Way, str] = {"fused": "#009E73", "full attention": "#D55E00", "slicemod": "#0072B2"}


def plot_largest(planner: PicturePlanner, names: Mapping[Way, str], path: Path, title: str) -> None:
    """Draws a line for each way to compute, and marks the memory that is asked about.

    Args:
        planner: of the whole.
        names: what the ways are called.
        path: the picture, of a format that matplotlib writes.
        title: above it.
    """
    exponents = range(-_DOUBLINGS * _POINTS_PER_DOUBLING, _DOUBLINGS * _POINTS_PER_DOUBLING + 1)
    memories = [round(planner.memory * 2 ** (exponent / _POINTS_PER_DOUBLING)) for exponent in exponents]
    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.axvline(planner.memory, color="0.3", linewidth=1, linestyle="--")
    marked = []
    for way in planner.ways:
        found = [planner.within(memory).largest(way) for memory in memories]
        drawn = [(memory, largest.pixels) for memory, largest in zip(memories, found, strict=True) if largest.pixels]
        if drawn:
            width = 4.5 if way == "fused" else 2  # slicemod's lies on it where both are the same
            axes.plot(
                *zip(*drawn, strict=True),
                color=_COLOURS[way],
                linewidth=width,
                label=names[way],
                marker="o",
                markersize=width + 1,
            )
        marked.append(found[len(found) // 2])
    _label(axes, planner.memory, marked)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(round(size)).replace(".00", "")))
    axes.set_xticks([planner.memory * 2.0**doubling for doubling in range(-_DOUBLINGS, _DOUBLINGS + 1)])
    axes.set_xlabel("memory of the device")
    axes.set_ylabel("edge of the largest square image, in pixels")
    axes.set_title(textwrap.fill(title, 100), loc="left", fontsize=10)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def _label(axes: Axes, memory: int, found: list[Largest]) -> None:
    """Writes each largest image beside the mark; ways with the same one share a label."""
    edges = {largest.pixels for largest in found if largest.pixels}
    for pixels in edges:
        same = [largest for largest in found if largest.pixels == pixels]
        is_highest = pixels == max(edges)  # no line runs to the upper left of it
        axes.annotate(
            f"{pixels} x {pixels}: {same[-1].why}",
            (memory, pixels),
            xytext=(-8, 6) if is_highest else (8, -14),
            textcoords="offset points",
            horizontalalignment="right" if is_highest else "left",
            color=_COLOURS[same[-1].way],
            fontsize=9,
        )
