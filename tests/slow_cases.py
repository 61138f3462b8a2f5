"""Which cases of a test are left to the slow run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

Value = TypeVar("Value")


def slow_if(is_slow: Callable[[Value], bool], values: Iterable[Value]) -> list[Any]:
    """The values for `parametrize`, with those marked slow that `is_slow` says are."""
    return [pytest.param(value, marks=pytest.mark.slow) if is_slow(value) else value for value in values]
