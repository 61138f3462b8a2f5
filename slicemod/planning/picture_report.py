"""Shows plans of the whole: as text and tables for the terminal, and as plain dictionaries for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from slicemod.memory.sizes import size_text
from slicemod.planning.picture_peaks import Largest, PartPeak, PicturePlanner, WholePlan
from slicemod.planning.step_peaks import Way

_SHORT: dict[Way, str] = {"full attention": "full attention", "fused": "PyTorch's fused", "slicemod": "slicemod"}


def names_of_ways(sliced: str) -> dict[Way, str]:
    """What the ways are called, with what is in slices in slicemod's."""
    return _SHORT | {"fused": "PyTorch's fused attention", "slicemod": f"slicemod: {sliced} in slices"}


def shown_ways(planner: PicturePlanner) -> tuple[Way, ...]:
    """The ways that are worth a column: full attention only where nothing is known of PyTorch's fused kernel."""
    return tuple(way for way in planner.ways if way != "full attention" or "fused" not in planner.ways)


def largest_table(planner: PicturePlanner, names: Mapping[Way, str], largest: Sequence[Largest]) -> Table:
    """The largest image for each way, by its name: what one wants to know first."""
    table = Table(
        title=f"largest square image within {size_text(planner.memory)}",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for column in ("computed by", "pixels", "limit"):
        table.add_column(column, no_wrap=True)
    for found in largest:
        table.add_row(names[found.way], found.size, found.limit or "the model takes no larger ones")
    return table


def parts_table(planner: PicturePlanner, plans: Sequence[WholePlan]) -> Table:
    """The parts of the whole: a row for every part at every resolution, and what they take at most."""
    ways = shown_ways(planner)
    table = Table(title="what each part takes", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("pixels", justify="right", no_wrap=True)
    weights = "weights, optimizer" if planner.trains else "weights"
    for column in ("part", weights, "stays loaded", *(f"peak, {_SHORT[way]}" for way in ways)):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for plan in plans:
        table.add_section()
        for part in plan.parts:
            sizes = (size_text(part.weights), size_text(part.stays_loaded), *(_peak(part, way) for way in ways))
            table.add_row(str(plan.pixels), part.name, *sizes)
        table.add_row(str(plan.pixels), "the most at once", "", "", *(_most(plan, way) for way in ways), style="bold")
    return table


def _peak(part: PartPeak, way: Way) -> str:
    return size_text(part.peaks[way]) if way in part.peaks else "-"


def _most(plan: WholePlan, way: Way) -> str:
    peak = plan.peak(way)
    return "does not fit" if peak is None or not plan.fits(way) else size_text(peak)


def remarks(planner: PicturePlanner, left_out: Sequence[str]) -> Iterator[str]:
    """The lines below the tables."""
    if "fused" not in planner.ways:
        yield "PyTorch's fused: it is not known whether PyTorch has a fused kernel on this device"
    if left_out:
        yield f"not counted, since nothing is known of them: {', '.join(left_out)}"


def largest_as_json(largest: Sequence[Largest]) -> dict[str, Any]:
    """The largest image of each way."""
    return {found.way: {"pixels": found.pixels, "limit": found.limit} for found in largest}


def whole_as_json(plan: WholePlan) -> dict[str, Any]:
    """The plan of one resolution."""
    ways = {way: None for part in plan.parts for way in part.peaks}
    return {
        "pixels": plan.pixels,
        "parts": [part._asdict() for part in plan.parts],
        "whole": {way: {"peak": plan.peak(way), "limit": plan.limit(way), "fits": plan.fits(way)} for way in ways},
    }
