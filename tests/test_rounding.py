"""Whole numbers rounded up."""

from __future__ import annotations

import pytest

from slicemod.rounding import ceil_div, round_up


@pytest.mark.parametrize(("size", "parts", "expected"), [(7, 2, 4), (8, 2, 4), (1, 3, 1), (0, 3, 0)])
def test_ceil_div_rounds_up(size: int, parts: int, expected: int) -> None:
    assert ceil_div(size, parts) == expected


@pytest.mark.parametrize(("size", "multiple", "expected"), [(7, 4, 8), (8, 4, 8), (0, 4, 0), (1, 64, 64)])
def test_round_up_gives_the_next_multiple(size: int, multiple: int, expected: int) -> None:
    assert round_up(size, multiple) == expected
