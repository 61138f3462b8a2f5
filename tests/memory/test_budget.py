"""Budgets: which forms are understood, what each allows, and when a device has to be looked at for it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slicemod.memory.budget import Budget
from slicemod.memory.free_memory import PROBES, MemoryProbe

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (1, 1),
        (536870912, 536870912),
        ("7", 7),
        ("512MiB", 512 * MIB),
        ("512 MiB", 512 * MIB),
        (" 2GB ", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("0.5KiB", 512),
        ("3B", 3),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("64KB", 64000),
        ("5MB", 5_000_000),
        ("2gib", 2**31),
        ("2gb", 2 * 10**9),
        ("2Gb", 2 * 10**9),
        ("3MIB", 3 * MIB),
        ("11b", 11),
        ("1e9", 10**9),
        ("1.5E+9", 1_500_000_000),
        ("1e3MiB", 1000 * MIB),
        (1e9, 10**9),
        (2.0, 2),
        ("2.0", 2),
    ],
)
def test_what_means_bytes(written: object, size: int) -> None:
    budget = Budget.parse(written)
    assert budget == Budget(bytes=size)
    assert isinstance(budget.bytes, int)


@pytest.mark.parametrize(
    ("written", "share"), [(0.25, 0.25), ("0.25", 0.25), (1.0, 1.0), ("1.0", 1.0), ("auto", 1.0), ("2.5e-1", 0.25)]
)
def test_what_means_a_share(written: object, share: float) -> None:
    assert Budget.parse(written) == Budget(share=share)


@pytest.mark.parametrize(
    "budget",
    [
        *(0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, -math.inf, True, False, None, []),
        *("", "0", "0.0", "0MiB", "-1MiB", "-1e9", "2.5", "1.5.1GiB", "0.1B", "1e-9MiB"),
        *("1e400", "1e400B", "nan", "inf", "12 furlongs", "1EiB", "MiB", "e9", "1e", "50%", "automatic"),
    ],
)
def test_refused_budgets_are_quoted_beside_what_is_accepted(budget: object) -> None:
    with pytest.raises(ValueError) as caught:
        Budget.parse(budget)
    assert "budget: expected" in str(caught.value)
    assert repr(budget) in str(caught.value)
    assert '"512MiB"' in str(caught.value)


@given(st.integers(1, 2**50))
def test_any_positive_number_of_bytes_means_itself(size: int) -> None:
    assert Budget.parse(size) == Budget.parse(str(size)) == Budget.parse(f"{size}B") == Budget(bytes=size)


def test_one_byte_is_not_all_there_is() -> None:
    byte, everything = Budget.parse(1), Budget.parse(1.0)
    assert byte != everything
    assert hash(byte) != hash(everything)


def test_a_budget_in_bytes_does_not_look_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(device: torch.device) -> int:
        raise AssertionError(f"asked {device}")

    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(read))
    assert Budget.parse("2KiB").bytes_on(CPU) == 2048
    assert Budget.parse("2KiB").surely_allows(2048, CPU)
    assert not Budget.parse("2KiB").surely_allows(2049, CPU)


def test_a_share_is_one_of_the_free_bytes(free_bytes: list[int]) -> None:
    free_bytes.append(1003)
    assert Budget.parse(0.5).bytes_on(CPU) == 501
    assert Budget.parse("auto").bytes_on(CPU) == 1003


def test_a_share_is_sure_of_what_is_left_of_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    everything, half = Budget(share=1.0), Budget(share=0.5)
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: 1000, lambda free, age: free - 26))
    everything.bytes_on(CPU)
    assert [everything.surely_allows(size, CPU) for size in (974, 975)] == [True, False]
    assert [half.surely_allows(size, CPU) for size in (487, 488)] == [True, False]


def test_where_nothing_is_known_to_be_left_a_share_allows_not_even_nothing(free_bytes: list[int]) -> None:
    Budget(share=1.0).bytes_on(CPU)
    assert not Budget(share=1.0).surely_allows(0, CPU)
