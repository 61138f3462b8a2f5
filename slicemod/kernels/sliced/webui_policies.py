"""The policies: pure functions over ints that answer how many heads, rows and keys a slice has.

The arithmetic of `heuristic`, `doggettx`, `invokeai` and `mps` is that of AUTOMATIC1111's webui (its attention
optimisations of those names); `exact` is slicemod's own, in `exact.py`.
"""

from __future__ import annotations

import math

from slicemod.call import AttentionShape
from slicemod.kernels.sliced.slices import Conditions, Slices, balanced_rows, whole
from slicemod.plan import NotEnoughMemoryError, not_enough

SAFETY_FACTOR = 3.3  # covers fragmentation and concurrent allocations
MOST_STEPS = 64  # what the webui gives up at
CPU_SLICE_MIB = 32  # InvokeAI: smaller slices are faster due to L2/L3 caches


def _webui_steps(shape: AttentionShape, available: float) -> int:
    """Powers of two until 3 (2-byte scores) or 2.5 times the scores fit; an error above 64."""
    required = shape.scores_bytes * (3 if shape.score_itemsize == 2 else 2.5)
    if required <= available:
        return 1
    steps = 2 ** math.ceil(math.log2(required / available)) if available > 0 else math.inf
    if steps > MOST_STEPS:
        side = square_resolution(available, 2.5)
        raise NotEnoughMemoryError(
            f"Not enough memory, use lower resolution (max approx. {side}x{side}). "
            f"Need: {required / MOST_STEPS / 2**30:0.1f}GB free, Have: {available / 2**30:0.1f}GB free "
            f"({required / MOST_STEPS:,.0f} and {available:,.0f} bytes, for {shape}). "
            f'The policy stops at {MOST_STEPS} steps; policy="exact" goes on to single rows.'
        )
    return int(steps)


def _invokeai_division(shape: AttentionShape, limit_mib: float) -> int:
    """1 if the scores fit in `limit_mib`, else the power of two above the quotient."""
    size = shape.scores_bytes // 2**20
    if size <= limit_mib:
        return 1
    if limit_mib <= 0:
        raise not_enough("invokeai", shape.scores_bytes, 0, shape, 0, "Free memory on the device")
    return 1 << int((size - 1) / limit_mib).bit_length()


def doggettx(shape: AttentionShape, given: Conditions) -> Slices:
    """What the webui's Doggettx optimisation decides."""
    return balanced_rows(shape, _webui_steps(shape, given.free_bytes))


def heuristic(shape: AttentionShape, given: Conditions) -> Slices:
    """Doggettx with a safety factor of 3.3 on the free memory, a cap for CPU caches, and Metal's own rule."""
    if given.device_type == "mps":
        return mps(shape, given)
    steps = _webui_steps(shape, given.free_bytes / SAFETY_FACTOR)
    if given.device_type == "cpu":
        steps = max(steps, _invokeai_division(shape, CPU_SLICE_MIB))
    return balanced_rows(shape, steps)


def invokeai(shape: AttentionShape, given: Conditions) -> Slices:
    """Batch x heads first, then query rows; on a CPU at most 32 MiB of scores at a time."""
    if given.device_type == "mps":
        return mps(shape, given)
    limit = CPU_SLICE_MIB if given.device_type == "cpu" else given.free_bytes / SAFETY_FACTOR / 2**20
    division = _invokeai_division(shape, limit)
    if division == 1:
        return whole(shape)
    if division <= shape.batch_heads:
        return Slices("heads", shape.batch_heads // division, shape.queries)
    return Slices("query", shape.batch_heads, max(shape.queries // division, 1))


def mps(shape: AttentionShape, given: Conditions) -> Slices:
    """At most 2**30 scores at a time on Metal, whatever is free, and never a multiple of 4096 rows."""
    rows_of_all_heads = shape.batch_heads * shape.queries
    if rows_of_all_heads <= 2**16:
        return whole(shape)
    rows = 2**30 // rows_of_all_heads
    if rows % 4096 == 0:
        rows -= 1  # exact multiples of 4096 trip the Metal allocator
    return Slices("query", shape.batch_heads, min(max(rows, 1), shape.queries))


def square_resolution(available: float, per_token_pair: float) -> int:
    """Side in pixels of the largest square image whose `N * N` scores fit, in steps of 64 pixels.

    `available / per_token_pair` token pairs, `N` of which are `(side / 8) ** 2` latent pixels. The webui's formula,
    `floor(sqrt(sqrt(available / 2.5)) / 8) * 64`, is this with 2.5 bytes a pair.
    """
    return math.floor(math.sqrt(math.sqrt(max(0.0, available) / per_token_pair)) / 8) * 64
