"""`Budget`: how much memory attention may take, in bytes or as a share of what is free."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from slicemod.memory.free_memory import free_memory, surely_free

ACCEPTED_BUDGETS = '"auto", bytes such as 536870912, a size such as "512MiB" or "2GB", or a fraction such as 0.25'
AMPLE = 2**62  # bytes, where memory does not matter: more than any machine has

_UNITS = {"b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*(|b|[kmgt]i?b)", flags=re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What attention may take: a number of bytes, or a share of its device's free memory.

    Attributes:
        bytes: at least 1. None if the budget is a share.
        share: of the free memory, above 0 and at most 1. It is used only if `bytes` is None.
    """

    bytes: int | None = None
    share: float = 1.0

    @classmethod
    def parse(cls, budget: object) -> Budget:
        """The budget that a user wrote.

        A whole number is bytes. A float is a share if it is at most 1. Above 1 it has to be whole and is bytes, because
        YAML reads 1e9 as a float. A text means the number in it. It may have a unit, in upper or lower case.

        Raises:
            ValueError: `budget` has none of the accepted forms, or is not positive.

        >>> Budget.parse("512MiB").bytes, Budget.parse("2gb").bytes, Budget.parse(1e9).bytes, Budget.parse(1).bytes
        (536870912, 2000000000, 1000000000, 1)
        >>> Budget.parse(0.25).share, Budget.parse("auto").share, Budget.parse(1.0).share
        (0.25, 1.0, 1.0)
        """
        number = 1.0 if budget == "auto" else budget
        if isinstance(number, str):
            number = _number_written(number)
        if isinstance(number, float):
            if 0.0 < number <= 1.0:
                return cls(share=number)
            number = int(number) if number.is_integer() else None
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"budget: expected {ACCEPTED_BUDGETS}; got {budget!r}. Write it in one of these forms.")
        return cls(bytes=number)

    def bytes_on(self, device: torch.device) -> int:
        """Bytes that the budget allows on `device`. The device's free memory is read only if the budget is a share.

        Raises:
            RuntimeError: the budget is a share, and the free memory of the device cannot be read.
        """
        return int(self.share * free_memory(device)) if self.bytes is None else self.bytes

    def surely_allows(self, size: int, device: torch.device) -> bool:
        """Whether it is known, without reading the device's memory again, that the budget allows `size` bytes."""
        if self.bytes is not None:
            return size <= self.bytes
        free = surely_free(device)
        return free > 0 and size <= self.share * free


def _number_written(text: str) -> int | float | None:
    """The number in `text`: an int of bytes if it has a unit or is whole, otherwise a float. None if there is none."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    number, unit = float(match[1]), match[2].lower()
    if not unit and not match[1].isdecimal():
        return number
    size = number * _UNITS[unit or "b"]
    return int(size) if size < math.inf else None
