"""Sizes in the unit that shows them."""

from __future__ import annotations

import pytest

from slicemod.memory.sizes import size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (8 * 2**20, "8.0 MiB"),
        (2**30 + 2**28, "1.25 GiB"),
        (2**41, "2,048.00 GiB"),
    ],
)
def test_a_size_is_never_written_as_zero_of_a_unit(size: int, text: str) -> None:
    assert size_text(size) == text
