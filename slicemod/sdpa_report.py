"""`SdpaReport`: what became of the calls of `F.scaled_dot_product_attention` while `sliced_sdpa` was on."""

from __future__ import annotations

from collections import Counter
from itertools import count
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch

from slicemod.call import attention_shape
from slicemod.plan import SlicePlan
from slicemod.watched import constant_in_graph, plain_values

# A report is filled from any thread, and a Counter's += is no single step.
_LOCK = Lock()
_NUMBERS = count()
_PLAN_FIELDS = SlicePlan.__match_args__


class SdpaReport:
    """Calls of `F.scaled_dot_product_attention`: how many, of which sizes, by which plans.

    A copy or a pickle of a report is an empty one: it belongs to other calls.

    Attributes:
        calls: how often, by (`str` of the call's `AttentionShape`, its `SlicePlan`); the plan is None where there was
            nothing to attend to.
        in_graphs: the same of calls that a compiler put into a graph. They count once for each graph, when it is
            traced; how often a graph runs is not known here. The plan is None where it is made when the graph runs.
        passed_on: how often PyTorch computed a call itself, by the reason.
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, SlicePlan | None]] = Counter()
        self.in_graphs: Counter[tuple[str, SlicePlan | None]] = Counter()
        self.passed_on: Counter[str] = Counter()
        self.number = next(_NUMBERS)  # by which a traced graph, where only plain values can be constants, finds it
        _REPORTS[self.number] = self

    def __reduce__(self) -> tuple[type[SdpaReport], tuple[()]]:
        return SdpaReport, ()

    @property
    def shapes(self) -> Counter[str]:
        """How many sliced calls of each size there were, eager and in graphs."""
        return self._summed(lambda shape, _plan: shape)

    @property
    def kernels(self) -> Counter[str]:
        """How many sliced calls each kernel took; "none" is the kernel of calls without a plan."""
        return self._summed(lambda _shape, plan: "none" if plan is None else plan.kernel)

    def _summed(self, label: Any) -> Counter[str]:
        summed: Counter[str] = Counter()
        with _LOCK:
            for (shape, plan), times in [*self.calls.items(), *self.in_graphs.items()]:
                summed[label(shape, plan)] += times
        return summed

    def __str__(self) -> str:
        with _LOCK:
            calls, in_graphs, passed_on = (list(each.items()) for each in (self.calls, self.in_graphs, self.passed_on))
        lines = [
            f"{_sum(calls)} calls sliced, {_sum(in_graphs)} put into compiled graphs, "
            f"{_sum(passed_on)} passed on to PyTorch"
        ]
        lines += [f"  {times} x [{shape}]: {plan or 'nothing to attend to'}" for (shape, plan), times in calls]
        lines += [
            f"  {times} x in a graph [{shape}]: {plan or 'planned when it runs'}" for (shape, plan), times in in_graphs
        ]
        lines += [f"  {times} x passed on: {reason}" for reason, times in passed_on]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<SdpaReport: {str(self).splitlines()[0]}>"


def _sum(counted: list[tuple[Any, int]]) -> int:
    return sum(times for _, times in counted)


_REPORTS: WeakValueDictionary[int, SdpaReport] = WeakValueDictionary()


def note_sliced(number: int, sizes: tuple[Any, ...] | None, plan: SlicePlan | None) -> None:
    """Count a sliced call in the report with this number; `sizes` of `attention_sizes`, None where they are symbols."""
    plain = None if plan is None else plain_values(plan, _PLAN_FIELDS)
    _note_sliced(number, sizes, plain, torch.compiler.is_compiling())


@constant_in_graph
def _note_sliced(number: int, sizes: tuple[Any, ...] | None, plan: tuple[Any, ...] | None, in_graph: bool) -> None:
    report = _REPORTS[number]
    call = (
        "sizes known when it runs" if sizes is None else str(attention_shape(sizes)),
        None if plan is None else SlicePlan(*plan),
    )
    with _LOCK:
        (report.in_graphs if in_graph else report.calls)[call] += 1


@constant_in_graph
def note_passed_on(number: int, reason: str) -> None:
    """Count a call that PyTorch computes itself in the report with this number."""
    report = _REPORTS[number]
    with _LOCK:
        report.passed_on[reason] += 1
