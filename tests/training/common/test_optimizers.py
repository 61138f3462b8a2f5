from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from slicemod.training.common.optimizers import WarmUp
from slicemod.user_error import UserError


def rates(steps: int, **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = WarmUp(optimizer, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_grows_then_stays() -> None:
    assert rates(6, warmup_steps=3) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert rates(2) == [0.5, 0.5]


def test_the_rate_falls_along_half_a_cosine() -> None:
    found = rates(12, warmup_steps=2, decay="cosine", total_steps=10)
    assert found[2] == 0.5
    assert found[4] == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)))
    assert found[6] == pytest.approx(0.25)
    assert found[10:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"decay": "cosine"}, "total_steps must be above warmup_steps, 0"),
        ({"decay": "cosine", "warmup_steps": 7, "total_steps": 7}, "total_steps must be above warmup_steps, 7"),
    ],
)
def test_steps_that_cannot_be_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        rates(1, **settings)
