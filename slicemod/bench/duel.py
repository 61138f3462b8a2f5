"""Which of two functions is faster, and by how much: in turns, until it is certain."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

SPAN = 0.002  # seconds of one turn, at least: shorter ones measure the clock
FEWEST, MOST = 9, 45  # pairs of turns
LONGEST = 1.0  # seconds, after which no pair begins if there were enough
TIE = 0.02  # a difference that is not worth another kernel

Seconds = Callable[[Callable[[], object], int], float]
"""Seconds that so many calls of a function take."""


class Ratio(NamedTuple):
    """The time of one function by that of another: the median over pairs of turns, and the interval in which the true
    median is with a certainty of 99%."""

    median: float
    low: float
    high: float

    @property
    def is_faster(self) -> bool | None:
        """Whether the first one is faster; None if they are as good as equal, or if it is not certain."""
        if self.high < 1 - TIE:
            return True
        return False if self.low > 1 + TIE else None


def seconds_of_calls(call: Callable[[], object], repeats: int) -> float:
    """Seconds of some calls, by the clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def duel(ours: Callable[[], object], theirs: Callable[[], object], seconds: Seconds = seconds_of_calls) -> Ratio:
    """The time of `ours` by that of `theirs`.

    They take turns, so that both meet the same load and clock rate. It stops as soon as one is certain to be faster,
    or after `MOST` pairs or `LONGEST` seconds.

    >>> duel(lambda: sum(range(2000)), lambda: sum(range(500))).is_faster
    False
    """
    calls = ours, theirs
    for call in calls:
        seconds(call, 1)  # the first call plans, compiles and touches memory
    quickest = min(seconds(call, 2) / 2 for call in calls)
    repeats = max(1, math.ceil(SPAN / max(quickest, 1e-9)))
    ratios: list[float] = []
    spent = 0.0
    while True:
        turn = {call: seconds(call, repeats) for call in (calls if len(ratios) % 2 else calls[::-1])}
        ratios.append(turn[ours] / turn[theirs])
        spent += sum(turn.values())
        if len(ratios) >= FEWEST:
            found = _ratio(ratios)
            if found.is_faster is not None or len(ratios) == MOST or spent > LONGEST:
                return found


def _ratio(ratios: list[float]) -> Ratio:
    ordered = sorted(ratios)
    # The ranks between which the true median lies: half as many as the count, give or take three standard deviations
    # of the binomial distribution. Two would be too few, as the answer is asked for after every pair.
    reach = 1.5 * math.sqrt(len(ordered))
    low, high = math.floor(len(ordered) / 2 - reach), math.ceil(len(ordered) / 2 + reach) - 1
    return Ratio(statistics.median(ordered), ordered[max(0, low)], ordered[min(len(ordered) - 1, high)])
