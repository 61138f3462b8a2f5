"""The memory that an option gives, on devices that are here and that are not."""

from __future__ import annotations

import pytest
import torch

from slicemod.planning.memory_given import bytes_given, is_here
from slicemod.user_error import UserError

CPU = torch.device("cpu")
ABSENT = next(torch.device(name) for name in ("xpu", "mps", "cuda") if not is_here(torch.device(name)))


def test_a_size_is_bytes_on_any_device() -> None:
    assert bytes_given("memory", "3MiB", CPU) == bytes_given("memory", "3MiB", ABSENT) == 3 * 2**20


def test_a_share_is_of_what_is_free(free_bytes: list[int]) -> None:
    free_bytes.append(1000)
    assert [bytes_given("budget", given, CPU) for given in ("auto", "0.5")] == [1000, 500]


def test_a_share_of_a_device_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=f"^budget: expected a size such as 8GiB, .* no {ABSENT}.* got 'auto'"):
        bytes_given("budget", "auto", ABSENT)


def test_what_is_no_budget_is_refused_by_the_name_of_the_option() -> None:
    with pytest.raises(UserError, match=r"^memory: .*got 'lots'"):
        bytes_given("memory", "lots", CPU)
