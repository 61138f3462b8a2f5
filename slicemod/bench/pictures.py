"""Results as PNGs: time against memory, ratios to SDPA, cost against resolution, cost against the number of tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from slicemod.bench.comparing import Measurement, Setting
from slicemod.bench.peers import OURS
from slicemod.bench.results import Results
from slicemod.bench.tables import by_peer, largest_sizes, named_works
from slicemod.rounding import ceil_div
from slicemod.user_error import UserError

_COLOURS = {"slicemod": "#c8452d", "sdpa": "#1f6f9f", "diffusers": "#4f7f4a"}
_OTHERS = "#73777d"
_DTYPES, _MARKERS = ("#c8452d", "#8a5aa8", "#4f7f4a", "#1f6f9f", "#73777d"), ("o", "s", "D", "^", "v")
_INK = "#2b2d30"
_LABEL_SIZE = 7.5
_STEPS = (1, 1.5, 2, 3, 5, 7)  # ticks of a decade, where there is room for them
_LEAST_SPAN = 4.0  # of the values on an axis, so that a line which hardly rises looks like it


class _Label(NamedTuple):
    """Text at the right of the axes that belongs to a point."""

    text: str
    x: float
    y: float
    colour: str


KINDS = ("trade", "ratios", "resolution", "growth")  # with which the names of the files begin
SOURCE = "Comment"  # the text chunk of a PNG that says which results it shows


class _Line(NamedTuple):
    """What one line shows."""

    name: str
    rows: Sequence[Measurement]
    dashed: bool = False


def save_pictures(results: Results, folder: Path) -> list[Path]:
    """Writes every picture that the results have the figures for, and tells their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, detail, draw in _drawings(results):
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', f'{kind} {detail}'.strip().lower())}.png"
        _write(draw(), results, path)
        written.append(path)
    return written


def save_picture(results: Results, kind: str, path: Path) -> None:
    """Writes the first picture of a kind.

    Raises:
        UserError: there are no figures for one.
    """
    draw = next((draw for found, _, draw in _drawings(results) if found == kind), None)
    if draw is None:
        raise UserError(
            f"{path.name}: expected results with the figures for a picture of kind {kind!r}; they have none."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(draw(), results, path)


def _write(figure: Figure, results: Results, path: Path) -> None:
    # Without the version of matplotlib the same figures make the same file.
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None, SOURCE: results.digest})


def _drawings(results: Results) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Kinds, what tells pictures of a kind apart, and what draws them."""
    in_pixels = [row for row in results.measurements if row.unit == "px"]
    largest = largest_sizes(in_pixels)
    for series in dict.fromkeys(row.series for row in in_pixels):
        yield "trade", series, partial(trade_off, [row for row in largest if row.series == series])
    if ours := [row for row in largest if row.peer == OURS]:
        yield "ratios", "", partial(ratios, ours)
    for setting in results.settings():
        for series in dict.fromkeys(row.series for row in in_pixels):
            rows = [row for row in in_pixels if (row.series, row.setting) == (series, setting)]
            if len({row.size for row in rows}) > 1:
                yield "resolution", f"{series} {setting}", partial(against_resolution, rows, setting)
    in_tokens = [row for row in results.measurements if row.unit == "tokens"]
    if len({row.size for row in in_tokens}) > 1:
        yield "growth", "", partial(growth, in_tokens)


def trade_off(rows: Sequence[Measurement]) -> Figure:
    """Time against peak memory of one work, a panel for each setting, with the frontier of the peers drawn."""
    panels = [(setting, list(group)) for setting, group in groupby(rows, lambda row: row.setting)]
    figure, grid = _panels(len(panels), f"time against memory: {rows[0].work}")
    for axes, (setting, peers) in zip(grid, panels, strict=True):
        _log_axes(axes, _mebibytes, _seconds)
        _title(axes, str(setting), "peak memory beyond inputs and weights")
        points = [(_peak(row), row.seconds) for row in peers]
        frontier = sorted(point for point in points if not any(_beats(other, point) for other in points))
        for row, (peak, seconds) in zip(peers, points, strict=True):
            best = (peak, seconds) in frontier
            axes.plot(peak, seconds, "o", ms=7 if best else 5, color=_colour(row.peer), mec="white", zorder=3)
        _label(axes, [_Label(row.peer, *point, _colour(row.peer)) for row, point in zip(peers, points, strict=True)])
        _staircase(axes, frontier)
        axes.set_xticks(_readable(*axes.get_xlim(), room=0.22))
        axes.set_yticks(_readable(*axes.get_ylim(), room=0.07))
    return figure


def against_resolution(rows: Sequence[Measurement], setting: Setting) -> Figure:
    """Time and peak of one series against the edge of the image."""
    figure, (pace, peak) = _panels(2, f"{rows[0].series}: {setting}")
    lines = [_Line(peer, found) for peer, found in by_peer(rows)]
    _lines(pace, lines, lambda row: row.seconds, _seconds)
    _title(pace, "time", "edge of the image in pixels")
    _lines(peak, lines, _peak, _mebibytes)
    _title(peak, "peak memory", "edge of the image in pixels")
    return figure


def growth(rows: Sequence[Measurement]) -> Figure:
    """Time per N^2, and peak beyond inputs and output, against the number of tokens N; dashed: not the first dtype."""
    dtypes = list(dict.fromkeys(row.setting.dtype for row in rows))
    modes = ", ".join(dict.fromkeys(row.setting.mode for row in rows))
    figure, (pace, peak) = _panels(2, f"how cost grows: {rows[0].series}, {modes}")
    lines = [
        _Line(f"{peer} {setting.dtype if modes == setting.mode else setting}", found, dtypes.index(setting.dtype) > 0)
        for setting in dict.fromkeys(row.setting for row in rows)
        for peer, found in by_peer([row for row in rows if row.setting == setting])
    ]
    _lines(pace, lines, lambda row: row.pace, lambda value: f"{value * 1e9:g} ns")
    _title(pace, "time / N²", "tokens N (k: 1,024)")
    _lines(peak, lines, lambda row: max(row.beyond_bytes, 1) / 2**20, _mebibytes)
    _title(peak, "peak beyond inputs and output", "tokens N (k: 1,024)")
    return figure


def ratios(rows: Sequence[Measurement]) -> Figure:
    """Time by SDPA's: a line for each work, a panel for each mode, a colour for each dtype, quartiles as bars."""
    size, names = named_works(rows)
    works = list(names)
    modes = list(dict.fromkeys(row.setting.mode for row in rows))
    dtypes = list(dict.fromkeys(row.setting.dtype for row in rows))
    left = _LETTER * max(map(len, names.values())) + _BESIDE / 2
    width = left + len(modes) * (_PANEL_WIDTH + _BESIDE)
    height = _HEAD + _ABOVE + _LINE * (len(works) + 1) + _BELOW
    figure = Figure(figsize=(width, height))
    grid: Any = figure.subplots(1, len(modes), squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(
        left=left / width, right=1 - _BESIDE / width, top=1 - (_HEAD + _ABOVE) / height, bottom=_BELOW / height,
        wspace=_BESIDE / _PANEL_WIDTH,
    )  # fmt: skip
    _heading(figure, f"time of {rows[0].peer} by that of SDPA{size}")
    for axes, mode in zip(grid.flat, modes, strict=True):
        axes.axvline(1.0, color=_COLOURS["sdpa"], lw=1.2, zorder=1)
        for row in (row for row in rows if row.setting.mode == mode):
            dtype = dtypes.index(row.setting.dtype)
            place = works.index(row.work) + (dtype - (len(dtypes) - 1) / 2) * _APART
            axes.plot(row.spread, [place, place], color=_DTYPES[dtype], lw=1.6, alpha=0.5, zorder=2)
            axes.plot(
                row.ratio, place, _MARKERS[dtype], ms=5.5, color=_DTYPES[dtype], mec="white", zorder=3,
                label=row.setting.dtype,
            )  # fmt: skip
        _title(axes, mode, "1 is SDPA's time; left of it is faster")
        axes.set(xlim=(0, max(1.1, *(1.05 * row.spread[1] for row in rows))), ylim=(len(works) - 0.4, -0.6))
        axes.set_yticks(range(len(works)), labels=names.values())
        axes.tick_params(labelsize=7.5, colors=_INK, length=2)
        axes.grid(True, lw=0.4, alpha=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    drawn = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    figure.legend(
        [drawn[dtype] for dtype in dtypes],
        dtypes,
        loc="upper right", ncols=len(dtypes), fontsize=_LABEL_SIZE, frameon=False, handletextpad=0.1,
        bbox_to_anchor=(1 - _BESIDE / width, 1 - 0.06 / height), borderaxespad=0, labelcolor=_INK,
    )  # fmt: skip
    return figure


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _readable(low: float, high: float, *, room: float) -> list[float]:
    """Ticks at round numbers, as many as leave `room` for their labels, a share of the axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    even = ([step / parts for step in range(parts, 10 * parts)] for parts in (10, 5, 4, 2))
    ticks: list[float] = []
    for steps in (*even, _STEPS, (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if all(right / left >= (high / low) ** room for left, right in pairwise(ticks)):
            break
    return ticks


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


def _title(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, fontsize=8.5, color=_INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=8, color=_INK)


def _lines(
    axes: Axes, lines: Sequence[_Line], value: Callable[[Measurement], float], text: Callable[[float], str]
) -> None:
    _log_axes(axes, lambda size: f"{size:,.0f}", text)
    sizes = sorted({row.size for line in lines for row in line.rows})
    short = lines[0].rows[0].unit == "tokens" and not any(size % 1024 for size in sizes)  # seven of them side by side
    axes.set_xticks(sizes, labels=[f"{size // 1024}k" if short else f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    labels = []
    for line in lines:
        values = [value(row) for row in line.rows]
        ours, colour = line.name.startswith(OURS), _colour(line.name)
        axes.plot(
            [row.size for row in line.rows], values, "o--" if line.dashed else "o-", color=colour,
            lw=2 if ours else 1.2, ms=4, mec="white", zorder=3 if ours else 2,
        )  # fmt: skip
        labels.append(_Label(line.name, line.rows[-1].size, values[-1], colour))
    low, high = axes.get_ylim()
    widened = max(1.0, math.sqrt(_LEAST_SPAN * low / high))
    axes.set_ylim(low / widened, high * widened)
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


_PANEL_WIDTH, _PANEL_HEIGHT = 1.95, 2.5  # inches of the axes
_LEFT, _RIGHT, _ABOVE, _BELOW = 0.62, 1.15, 0.4, 0.55  # around them, with room for the labels at the right
_HEAD = 0.3  # for the title of the picture
_LETTER, _BESIDE, _LINE = 0.064, 0.3, 0.3  # of the ratios: for a letter of a work's name, beside a panel, for a work
_APART = 0.22  # the dtypes of a work, in lines
_COLUMNS = 2  # in which the text is read at the width of a page


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    wide = min(count, _COLUMNS)
    high = ceil_div(count, wide)
    width = wide * (_LEFT + _PANEL_WIDTH + _RIGHT)
    height = high * (_ABOVE + _PANEL_HEIGHT + _BELOW) + _HEAD
    figure = Figure(figsize=(width, height))
    grid: Any = figure.subplots(high, wide, squeeze=False)
    figure.subplots_adjust(
        left=_LEFT / width, right=1 - _RIGHT / width, top=1 - (_HEAD + _ABOVE) / height, bottom=_BELOW / height,
        wspace=(_LEFT + _RIGHT) / _PANEL_WIDTH, hspace=(_ABOVE + _BELOW) / _PANEL_HEIGHT,
    )  # fmt: skip
    _heading(figure, title)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _heading(figure: Figure, title: str) -> None:
    width, height = figure.get_size_inches()
    figure.suptitle(
        title, x=0.12 / width, ha="left", y=1 - 0.12 / height, va="top", fontsize=10, color=_INK, weight="bold"
    )


def _log_axes(axes: Axes, x: Callable[[float], str], y: Callable[[float], str]) -> None:
    axes.set(xscale="log", yscale="log")
    for axis, text in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_locator(LogLocator(10, subs=_STEPS, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7.5, colors=_INK, which="both", length=2)
    axes.grid(True, which="major", lw=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colour(peer: str) -> str:
    return next((colour for family, colour in _COLOURS.items() if peer.startswith(family)), _OTHERS)


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:g} s"
    return f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} µs"


def _mebibytes(value: float) -> str:
    return f"{value:,g} MiB"


def _peak(row: Measurement) -> float:
    """In MiB, and above zero for the logarithm."""
    return max(row.peak_bytes, 1) / 2**20
