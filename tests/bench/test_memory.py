"""peak_memory: what a call held at once, to the byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slicemod.bench.memory import peak_memory


def one_after_the_other() -> Tensor:
    first = torch.zeros(1000)
    del first
    return torch.zeros(700)


def both_at_once() -> tuple[Tensor, Tensor]:
    first = torch.zeros(1000)
    return first, torch.zeros(700)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: None, 0),
        (lambda: torch.zeros(1000), 4000),
        (lambda: torch.zeros(1000, dtype=torch.float64), 8000),
        (one_after_the_other, 4000),
        (both_at_once, 6800),
        (lambda: torch.zeros(1000).view(10, 100).mT[3:], 4000),
    ],
    ids=["nothing", "floats", "doubles", "one after the other", "both at once", "views"],
)
def test_the_peak_is_what_was_held_at_once(call: Callable[[], object], expected: int) -> None:
    assert peak_memory(call) == expected


def test_what_was_there_before_does_not_count() -> None:
    tensor = torch.zeros(1000)
    assert peak_memory(lambda: tensor.mul_(tensor)) == 0


def test_allocations_inside_operators_count() -> None:
    tensor = torch.zeros(1000)
    assert peak_memory(lambda: torch.cat([tensor, tensor]).sum()) == 8000 + 4


def test_a_second_measurement_is_like_the_first() -> None:
    def call() -> Tensor:
        return torch.zeros(1000) + torch.ones(1000)

    assert peak_memory(call) == peak_memory(call) == 12000


def test_an_error_of_the_call_is_passed_on() -> None:
    def call() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        peak_memory(call)
    assert peak_memory(lambda: torch.zeros(1000)) == 4000


def test_the_scores_of_plain_attention_are_seen() -> None:
    query = torch.randn(2, 3, 61, 11)
    peak = peak_memory(lambda: torch.softmax(query @ query.mT, -1) @ query)
    scores = 2 * 3 * 61 * 61 * 4
    assert 2 * scores <= peak < 3 * scores
