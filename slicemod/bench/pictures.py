"""Results as PNGs: time against memory, cost against resolution, cost against the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from slicemod.bench.comparing import Measurement, Setting
from slicemod.bench.results import Results
from slicemod.bench.tables import by_peer

_COLOURS = {"slicemod": "#c8452d", "sdpa": "#1f6f9f", "diffusers": "#4f7f4a"}
_OTHERS = "#73777d"
_INK = "#2b2d30"
_LABEL_SIZE = 7.5


class _Label(NamedTuple):
    """Text at the right of the axes that belongs to a point."""

    text: str
    x: float
    y: float
    colour: str


def save_pictures(results: Results, folder: Path) -> list[Path]:
    """Writes every picture that the results have the figures for, and tells their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for setting in results.settings():
        rows = [row for row in results.measurements if row.setting == setting]
        in_pixels = [row for row in rows if row.unit == "px"]
        drawn = {
            "trade": trade_off(in_pixels, setting) if in_pixels else None,
            "resolution": against_resolution(in_pixels, setting),
            "growth": growth([row for row in rows if row.unit == "tokens"], setting),
        }
        for kind, figure in drawn.items():
            if figure is not None:
                path = folder / f"{kind}-{str(setting).replace(', ', '-')}.png"
                # Without the version of matplotlib the same figures make the same file.
                figure.savefig(path, format="png", dpi=160, metadata={"Software": None})
                written.append(path)
    return written


def trade_off(rows: Sequence[Measurement], setting: Setting) -> Figure:
    """Time against peak memory, a panel for each work, a point for each peer, with the frontier drawn."""
    panels = [(work, list(group)) for work, group in groupby(rows, lambda row: row.work)]
    figure, grid = _panels(len(panels), f"time against memory: {setting}")
    for axes, (work, peers) in zip(grid, panels, strict=True):
        _log_axes(axes, _bytes, _seconds)
        _title(axes, work, "peak memory beyond inputs and weights", "time")
        points = [(max(row.peak_bytes, 1), row.seconds) for row in peers]
        frontier = sorted(point for point in points if not any(_beats(other, point) for other in points))
        for row, (peak, seconds) in zip(peers, points, strict=True):
            best = (peak, seconds) in frontier
            axes.plot(peak, seconds, "o", ms=7 if best else 5, color=_colour(row.peer), mec="white", zorder=3)
        _label(axes, [_Label(row.peer, *point, _colour(row.peer)) for row, point in zip(peers, points, strict=True)])
        _staircase(axes, frontier)
        axes.xaxis.set_major_locator(LogLocator(10, subs=_readable(*axes.get_xlim())))
    return figure


def against_resolution(rows: Sequence[Measurement], setting: Setting) -> Figure | None:
    """Time and peak against the edge of the image, a row of two panels for each series of several sizes."""
    series: dict[str, list[Measurement]] = {}
    for row in rows:
        series.setdefault(row.series, []).append(row)
    series = {name: found for name, found in series.items() if len({row.size for row in found}) > 1}
    if not series:
        return None
    figure, grid = _panels(2 * len(series), f"cost against resolution: {setting}", columns=2)
    for number, (name, found) in enumerate(series.items()):
        _lines(grid[2 * number], found, lambda row: row.seconds, _seconds)
        _title(grid[2 * number], f"{name}: time", "edge of the image in pixels")
        _lines(grid[2 * number + 1], found, lambda row: row.peak_bytes, _bytes)
        _title(grid[2 * number + 1], f"{name}: peak memory", "edge of the image in pixels")
    return figure


def growth(rows: Sequence[Measurement], setting: Setting) -> Figure | None:
    """Time per N^2, and peak beyond inputs and output, against the number of tokens N."""
    if len({row.size for row in rows}) < 2:
        return None
    figure, (pace, peak) = _panels(2, f"how cost grows: {rows[0].series}, {setting}", columns=2)
    _lines(pace, rows, lambda row: row.seconds / row.size**2, lambda value: f"{value * 1e9:g} ns")
    _title(pace, "time / N²", "tokens N")
    _lines(peak, rows, lambda row: max(row.peak_bytes - row.output_bytes, 1), _bytes)
    _title(peak, "peak beyond inputs and output", "tokens N")
    return figure


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _readable(low: float, high: float) -> tuple[float, ...]:
    """Ticks within each decade that leave room for their labels side by side."""
    decades = math.log10(high / low)
    return (1.0,) if decades > 2.2 else (1.0, 2.0, 5.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def _staircase(axes: Axes, frontier: Sequence[tuple[float, float]]) -> None:
    """What lies above and to the right of the line is beaten in time and in memory."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    peaks = [peak for peak, _ in frontier] + [right]
    seconds = [top] + [seconds for _, seconds in frontier]
    axes.plot(
        [peaks[0], *peaks], [*seconds, seconds[-1]], drawstyle="steps-post", color=_INK, lw=0.8, alpha=0.6, zorder=1
    )
    axes.fill_between(peaks, [*seconds[1:], seconds[-1]], top, step="post", color=_INK, alpha=0.035, lw=0, zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _title(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    axes.set_title(title, fontsize=9, color=_INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=8, color=_INK)
    axes.set_ylabel(ylabel, fontsize=8, color=_INK)


def _lines(
    axes: Axes, rows: Sequence[Measurement], value: Callable[[Measurement], float], text: Callable[[float], str]
) -> None:
    _log_axes(axes, lambda size: f"{size:,.0f}", text)
    sizes = sorted({row.size for row in rows})
    axes.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    labels = []
    for peer, found in by_peer(rows):
        values = [value(row) for row in found]
        ours = peer.startswith("slicemod")
        axes.plot(
            [row.size for row in found], values, "o-", color=_colour(peer), lw=2 if ours else 1.2, ms=4, mec="white",
            zorder=3 if ours else 2,
        )  # fmt: skip
        labels.append(_Label(peer, found[-1].size, values[-1], _colour(peer)))
    _label(axes, labels)


def _label(axes: Axes, labels: list[_Label]) -> None:
    """Puts labels in a column at the right, each as high as its point where there is room, a thin line between."""
    axes.margins(0.08)
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    step = (high - low) * _LABEL_SIZE * 1.25 / 72 / _PANEL_HEIGHT
    ordered = sorted(labels, key=lambda label: label.y)
    places = [math.log10(label.y) for label in ordered]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + step)
    over = max(0.0, places[-1] - high) if places else 0.0
    limit = math.inf
    for number in reversed(range(len(places))):  # back down from the top
        places[number] = min(places[number], high if over else math.inf, limit)
        limit = places[number] - step
    to_axes = axes.transData + axes.transAxes.inverted()
    for label, place in zip(ordered, places, strict=True):
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(1.03, float(to_axes.transform((label.x, 10**place))[1])),
            textcoords="axes fraction",
            fontsize=_LABEL_SIZE,
            color=label.colour,
            weight="bold" if label.text.startswith("slicemod") else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "lw": 0.5,
                "color": label.colour,
                "alpha": 0.45,
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


_PANEL_WIDTH, _PANEL_HEIGHT = 3.3, 2.9  # inches of the axes


def _panels(count: int, title: str, columns: int = 3) -> tuple[Figure, list[Axes]]:
    wide = min(count, columns)
    high = -(-count // wide)
    figure = Figure(figsize=(wide * (_PANEL_WIDTH + 2.9), high * (_PANEL_HEIGHT + 1.0) + 0.4))
    grid: Any = figure.subplots(high, wide, squeeze=False)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 2.15 / width, top=1 - 0.75 / height, bottom=0.55 / height, wspace=0.88, hspace=0.38
    )
    figure.suptitle(
        title, x=0.12 / width, ha="left", y=1 - 0.12 / height, va="top", fontsize=11, color=_INK, weight="bold"
    )
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _log_axes(axes: Axes, x: Callable[[float], str], y: Callable[[float], str]) -> None:
    axes.set(xscale="log", yscale="log")
    for axis, text in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7.5, colors=_INK, which="both", length=2)
    axes.grid(True, which="major", lw=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colour(peer: str) -> str:
    return next((colour for family, colour in _COLOURS.items() if peer.startswith(family)), _OTHERS)


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _bytes(value: float) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"
