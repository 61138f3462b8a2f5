"""How kernels and choices are shown: tables for the terminal, and plain dictionaries for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from slicemod.call import dtype_name
from slicemod.kernels.table_in_use import TableInUse
from slicemod.memory.sizes import size_text
from slicemod.planning.kernel_choices import LayerChoice, Presence


class Reasons:
    """The reasons in the tables, numbered in the order in which they come; each is written once, below them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, reason: str) -> int:
        """The number of a reason."""
        return self._numbers.setdefault(reason, len(self._numbers) + 1)

    def lines(self) -> Iterable[str]:
        """A line for each."""
        return (f"({number}) {reason}" for reason, number in self._numbers.items())


def kernels_table(title: str, kernels: Iterable[Presence]) -> Table:
    """A row for every kernel, best first."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    table.add_column("runs here in")
    table.add_column("what it is")
    for kernel in kernels:
        dtypes = ", ".join(map(dtype_name, kernel.dtypes))
        table.add_row(kernel.kernel, dtypes or f"no: {kernel.obstacle}", kernel.summary)
    return table


def choices_table(title: str, choices: Iterable[LayerChoice], reasons: Reasons) -> Table:
    """A row for every shape of attention, in inference and in training."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("mode", "layers", "B*H x N x M x D", "kernel", "steps", "peak"):
        table.add_column(column, justify="left" if column in ("mode", "kernel") else "right", no_wrap=True)
    table.add_column("passed over")
    training = False
    for choice in choices:
        if choice.training != training:
            training = choice.training
            table.add_section()
        shape, plan = choice.shape, choice.plan
        sizes = f"{shape.batch_heads} x {shape.queries} x {shape.keys} x {shape.head_dim}"
        answer = ("none fits", "-", "-") if plan is None else (plan.kernel, str(plan.steps), size_text(plan.peak_bytes))
        passed = ", ".join(f"{kernel} ({reasons.number(reason)})" for kernel, reason in choice.passed_over.items())
        table.add_row("training" if training else "inference", str(choice.layers), sizes, *answer, passed or "-")
    return table


def presence_as_json(kernel: Presence) -> dict[str, Any]:
    """One kernel."""
    return {**kernel._asdict(), "dtypes": [dtype_name(dtype) for dtype in kernel.dtypes]}


def table_as_json(table: TableInUse) -> dict[str, Any]:
    """The table that kernels are chosen by, without its rows."""
    return {"source": table.source, **{name: value for name, value in table.table.as_dict().items() if name != "rows"}}


def choice_as_json(choice: LayerChoice) -> dict[str, Any]:
    """One choice: bytes and counts, and the reasons in words."""
    plan = choice.plan
    return {
        "layers": choice.layers,
        "training": choice.training,
        "shape": asdict(choice.shape),
        "kernel": None if plan is None else plan.kernel,
        "peak_bytes": None if plan is None else plan.peak_bytes,
        "plan": None if plan is None else asdict(plan),
        "passed_over": choice.passed_over,
    }
