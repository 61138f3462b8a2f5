"""Any two values of two axes meet in some row, in far fewer rows than all combinations."""

from __future__ import annotations

import itertools

import pytest

from tests.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (4, 12, 11, 2), (3, 3, 3, 3, 3)], ids=str)
def test_every_pair_of_values_is_in_a_row(sizes: tuple[int, ...]) -> None:
    rows = pairwise(*map(range, sizes))
    for (one, many), (other, more) in itertools.combinations(enumerate(sizes), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(range(many), range(more)))
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 2 * largest[0] * largest[-1]
