"""Shows plans: as tables for the terminal, and as plain dictionaries for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from slicemod.memory.sizes import size_text
from slicemod.plan import SlicePlan
from slicemod.planning.step_peaks import LayerPlan, ResolutionPlan, StepPlanner


def attention_table(title: str, image: str, layers_of: Iterable[tuple[str, Sequence[LayerPlan]]]) -> Table:
    """A row for every shape of attention in every image.

    Args:
        title: of the table.
        image: what images are called by, the head of the first column.
        layers_of: what each of them is called, and its layers.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in (image, "layers", "B*H x N x M x D", "kernel", "axis", "steps", "peak"):
        table.add_column(column, justify="left" if column in ("kernel", "axis") else "right", no_wrap=True)
    for name, layers in layers_of:
        table.add_section()
        for layer in layers:
            shape = layer.shape
            sizes = f"{shape.batch_heads} x {shape.queries} x {shape.keys} x {shape.head_dim}"
            table.add_row(name, str(layer.layers), sizes, *_answer(layer))
    return table


def _answer(layer: LayerPlan) -> tuple[str, ...]:
    plan = layer.plan
    if plan is None:
        return "the model's own", "-", "-", "-"
    if not isinstance(plan, SlicePlan):
        return "-", "-", "-", "none fits"
    sliced = plan.axis if plan.steps > 1 else "-"
    return plan.kernel, sliced, str(plan.steps), size_text(plan.peak_bytes)


def step_table(planner: StepPlanner, plans: Sequence[ResolutionPlan]) -> Table:
    """The parts of the peak of the whole step: a row for every way to compute attention at every resolution."""
    trained = ["gradients", "optimizer"] if planner.kind.training else []
    parts = ["weights", "activations", *trained, "attention", "total"]
    table = Table(title="peak of the whole step", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("pixels", justify="right")
    table.add_column("attention by", no_wrap=True)
    for part in parts:
        table.add_column(part, justify="right", no_wrap=True)
    table.add_column("fits")
    for plan in plans:
        table.add_section()
        for way in planner.ways:
            peak = plan.peaks.get(way)
            sizes = ("-" if peak is None else size_text(getattr(peak, part)) for part in parts)
            table.add_row(str(plan.pixels), way, *sizes, "yes" if planner.fits(way, plan.pixels) else "no")
    return table


def remarks(planner: StepPlanner, plans: Sequence[ResolutionPlan]) -> Iterator[str]:
    """The lines below the tables: the largest image of each way, and the budget or the error of each resolution."""
    for way in planner.ways:
        pixels = planner.largest(way)
        largest = f"{pixels} x {pixels}" if pixels else "none"
        yield f"largest square image within {size_text(planner.memory)}, {way}: {largest}"
    if "fused" not in planner.ways:
        yield f"fused: it is not known whether PyTorch has a fused kernel on {planner.kind.device_type}"
    for plan in plans:
        errors = [str(layer.plan) for layer in plan.layers if not isinstance(layer.plan, SlicePlan)]
        left = f"the rest of the step leaves attention a budget of {size_text(plan.budget)}"
        yield f"{plan.pixels} x {plan.pixels}: {errors[0] if errors else left}"


def as_json(plan: ResolutionPlan) -> dict[str, Any]:
    """The plan of one resolution as a dictionary for JSON."""
    return {
        "pixels": plan.pixels,
        "budget": plan.budget,
        "layers": [
            {"shape": asdict(layer.shape), "layers": layer.layers}
            | ({"plan": asdict(layer.plan)} if isinstance(layer.plan, SlicePlan) else {"error": str(layer.plan)})
            for layer in plan.layers
        ],
        "peaks": {way: {**peak._asdict(), "total": peak.total} for way, peak in plan.peaks.items()},
    }
