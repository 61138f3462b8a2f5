"""Fewer cases than all combinations: any two values of two axes meet in one, where faults that need three are rare.

What is left is for the property tests, which draw any combination.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value of each axis that hold every pair of values of two axes, the same rows in every process."""
    values = [list(axis) for axis in axes]
    pairs = itertools.combinations(range(len(values)), 2)
    missing = {  # a dict, which is ordered: ((axis, index), (other axis, its index))
        ((one, i), (other, j)): None
        for one, other in pairs
        for i, j in itertools.product(range(len(values[one])), range(len(values[other])))
    }
    rows = []
    while missing:
        chosen = dict(next(iter(missing)))
        for axis in range(len(values)):
            if axis not in chosen:
                counts = [
                    sum(_pair((axis, i), place) in missing for place in chosen.items())
                    for i in range(len(values[axis]))
                ]
                chosen[axis] = counts.index(max(counts))
        for pair in itertools.combinations(sorted(chosen.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(values[axis][chosen[axis]] for axis in range(len(values))))
    return rows


def _pair(one: tuple[int, int], other: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (one, other) if one < other else (other, one)
