"""Measures from which sizes on each kernel pays off, and makes a table of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from slicemod import kernels
from slicemod.bench.duel import Ratio, duel
from slicemod.bench.tuned_calls import TunedCall
from slicemod.kernels.crossover_table import Corner, CrossoverTable, Row

Compare = Callable[[TunedCall, str, str], Ratio]
"""The time of a call by one kernel, by its time by another one."""


class Finding(NamedTuple):
    """What was measured of one call.

    Attributes:
        call: the call.
        rival: the kernel that `auto` would take without the one that is tuned.
        ratio: its time by that of the rival; None if time was up.
        is_faster: by the measurement, or where it is undecided by the built-in table.
    """

    call: TunedCall
    rival: str
    ratio: Ratio | None
    is_faster: bool

    @property
    def is_decided(self) -> bool:
        """By the measurement."""
        return self.ratio is not None and self.ratio.is_faster is not None


def compare_on_this_machine(call: TunedCall, kernel: str, rival: str) -> Ratio:
    """By the clock."""
    return duel(call.run_by(kernel), call.run_by(rival))


class Tuning:
    """Finds a table.

    `groups` does the measuring, a call at a time, so that whoever drives it may show progress; `table` and `findings`
    have what is known by then.

    Args:
        built_in: the table that decides ties, and calls that cannot be measured.
        compare: measures a call.
        until: the time of `clock` after which nothing more is measured.
        clock: seconds.
    """

    def __init__(
        self,
        built_in: CrossoverTable,
        compare: Compare = compare_on_this_machine,
        until: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = self._built_in = built_in
        self.findings: list[Finding] = []
        self._compare, self._until, self._clock = compare, until, clock

    def measure(self, groups: Sequence[Sequence[TunedCall]]) -> Iterator[TunedCall]:
        """Measures the calls of each group, whose rows in the table are then replaced; yields each call that is
        measured. A group with a call that its kernel cannot run stays as it is."""
        for group in groups:
            found: list[Finding] = []
            for call in group:
                if (rival := self._rival(call)) is None:
                    break
                yield call
                found.append(self._finding(call, rival))
            else:
                self.findings += found
                self.table = replaced(self.table, rows_of(found))

    def _finding(self, call: TunedCall, rival: str) -> Finding:
        ratio = None if self._clock() > self._until else self._compare(call, call.calls.kernel, rival)
        measured = None if ratio is None else ratio.is_faster
        if measured is None:
            measured = kernels.kernel_named(call.calls.kernel).pays_off(call.spec, self._built_in)
        return Finding(call, rival, ratio, measured)

    def _rival(self, call: TunedCall) -> str | None:
        """The kernel that `auto` would take without the one that is tuned; None if the latter cannot run the call."""
        names = [kernel.name for kernel in kernels.KERNELS]
        place = names.index(call.calls.kernel)
        if kernels.KERNELS[place].obstacle(call.spec) is not None:
            return None
        able = (kernel for kernel in kernels.KERNELS[place + 1 :] if kernel.obstacle(call.spec) is None)
        return next((kernel.name for kernel in able if kernel.pays_off(call.spec, self.table)), None)


def rows_of(findings: Sequence[Finding]) -> list[Row]:
    """A row for each class of calls."""
    by_class = groupby(findings, lambda finding: finding.call.calls)
    return [Row(calls, corners([(own.call.size, own.is_faster) for own in found])) for calls, found in by_class]


def corners(measured: Sequence[tuple[Corner, bool]]) -> tuple[Corner, ...]:
    """The smallest sizes from which on no measured call is slower. Then a larger call never loses what a smaller one
    has: the choice is monotone.

    >>> corners([(Corner(16, 77, 1), False), (Corner(64, 77, 4), True), (Corner(64, 16, 1), True)])
    (Corner(queries=64, keys=16, products=1),)
    """
    slower = [size for size, is_faster in measured if not is_faster]
    safe = {size for size, is_faster in measured if is_faster and not any(other.reaches(size) for other in slower)}
    return tuple(sorted(size for size in safe if not any(size.reaches(other) for other in safe - {size})))


def replaced(table: CrossoverTable, rows: Sequence[Row]) -> CrossoverTable:
    """The table with these rows in the place of those for the same calls, of any width; new ones come last."""
    new: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        new.setdefault(row.calls[:4], []).append(row)
    kept: list[Row] = []
    for kind, old in groupby(table.rows, lambda row: row.calls[:4]):
        kept += new.pop(kind, old)
    return replace(table, rows=(*kept, *(row for of_kind in new.values() for row in of_kind)))
