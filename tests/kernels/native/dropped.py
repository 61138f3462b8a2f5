"""Which weights the native kernel drops, computed by numpy from the formula of csrc/dropout.h."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[Any]


def dropout_factors(seed: int, dropout_p: float, heads: int, queries: int, keys: int) -> Tensor:
    """The factor of each weight, `(heads, queries, keys)` in float64, for all heads of all items."""
    with np.errstate(over="ignore"):
        head = _split_mix(_split_mix(np.uint64(seed)) + np.arange(heads, dtype=np.uint64))[:, None]
        rows = _split_mix(head ^ _split_mix(np.arange(queries, dtype=np.uint64)))[..., None]
        low, high = rows.astype(np.uint32), (rows >> np.uint64(32)).astype(np.uint32)
        x = np.arange(keys, dtype=np.uint32) * np.uint32(0x9E3779B9) + low
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
        x = (x ^ x >> np.uint32(16) ^ high) * np.uint32(0x2C1B3C6D)
        x = (x ^ x >> np.uint32(12)) * np.uint32(0x297A2D39)
        x = (x ^ x >> np.uint32(15)) >> np.uint32(1)
    return torch.from_numpy(np.where(x >= np.uint32(dropout_p * 2**31), 1 / (1 - dropout_p), 0.0))


def _split_mix(x: Numbers) -> Numbers:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ x >> np.uint64(31))
