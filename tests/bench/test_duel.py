"""Which of two functions is faster: certain where it is, undecided where it is not. The clock is the test's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from slicemod.bench.duel import FEWEST, MOST, duel


def clock(draw: Callable[[int], float], counted: list[int]) -> Callable[[Callable[[], Any], int], float]:
    """Seconds that functions take, which return 0 for ours and 1 for theirs."""

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        counted.append(repeats)
        return repeats * draw(call())

    return seconds


def ours() -> int:
    return 0


def theirs() -> int:
    return 1


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 3.0])
def test_a_clear_difference_is_found_at_once(ratio: float) -> None:
    counted: list[int] = []
    found = duel(ours, theirs, clock(lambda which: 1e-4 * (ratio, 1.0)[which], counted))
    assert found.median == pytest.approx(ratio)
    assert found.is_faster == (ratio < 1)
    assert len(counted) == 4 + 2 * FEWEST
    assert sum(counted[4:6]) * 1e-4 * min(ratio, 1) >= 0.002  # short calls are repeated


def test_equals_are_undecided_after_all_turns() -> None:
    counted: list[int] = []
    found = duel(ours, theirs, clock(lambda which: 1e-3, counted))
    assert found.is_faster is None
    assert len(counted) == 4 + 2 * MOST
    counted.clear()
    duel(ours, theirs, clock(lambda which: 3.0, counted))
    assert len(counted) == 4 + 2 * FEWEST


def test_noise_that_is_larger_than_the_difference_is_refused() -> None:
    draw = random.Random(0)
    for seed in range(20):
        draw.seed(seed)
        found = duel(ours, theirs, clock(lambda which: draw.lognormvariate(0, 1.5), []))
        assert found.low < found.median < found.high
        assert found.is_faster is None


def test_a_difference_is_found_below_noise_that_both_meet() -> None:
    draw = random.Random(0)
    found = duel(ours, theirs, clock(lambda which: (0.8, 1.0)[which] * draw.uniform(1, 1.2), []))
    assert found.is_faster is True
    assert found.median == pytest.approx(0.8, rel=0.1)
