"""The numbers that Triton's philox draws, by numpy, so that the tests know which weights are dropped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_ROUNDS = 10


def dropout_factors(seed: int, dropout_p: float, heads: int, queries: int, keys: int) -> Tensor:
    """The factor of each weight, `(heads, queries, keys)` in float64, for all heads of all items."""
    places = np.indices((heads, queries, keys), dtype=np.uint32)
    counters = [places[2], places[1], places[0], np.zeros_like(places[0])]
    halves = [np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)]
    with np.errstate(over="ignore"):
        for _ in range(_ROUNDS):
            one, other = (
                _MULTIPLIERS[0] * counters[0].astype(np.uint64),
                _MULTIPLIERS[1] * counters[2].astype(np.uint64),
            )
            counters = [
                _high(other) ^ counters[1] ^ halves[0],
                other.astype(np.uint32),
                _high(one) ^ counters[3] ^ halves[1],
                one.astype(np.uint32),
            ]
            halves = [half + step for half, step in zip(halves, _STEPS, strict=True)]
    drawn = counters[0].view(np.int32)
    uniform = np.where(drawn < 0, -drawn - 1, drawn) * np.float32(4.6566127342e-10)
    return torch.from_numpy(np.where(uniform >= np.float32(dropout_p), 1 / (1 - dropout_p), 0.0))


def _high(products: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    high: npt.NDArray[np.uint32] = (products >> np.uint64(32)).astype(np.uint32)
    return high
