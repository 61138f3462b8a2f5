"""The policies that decide as AUTOMATIC1111's webui does. docs/heuristics.md explains them with examples.

They are pure functions from sizes and free bytes to the heads and rows of a slice. Their arithmetic is that of the
webui's attention optimisations. slicemod's own policy is in `exact.py`.
"""

from __future__ import annotations

import math

from slicemod.call import AttentionShape
from slicemod.kernels.sliced.slices import Conditions, Slices, balanced_rows, whole
from slicemod.plan import NotEnoughMemoryError, not_enough

# These three numbers are the webui's.
SAFETY_FACTOR = 3.3  # for fragmentation and what others allocate
MOST_STEPS = 64  # with more steps, the webui raises an error
CPU_SLICE_MIB = 32  # InvokeAI's comment: smaller slices are faster because of the L2 and L3 caches


def _webui_steps(shape: AttentionShape, available: float) -> int:
    """The smallest power of two of steps with which 3 times the scores fit (2.5 times if not of 2 bytes).

    Raises:
        NotEnoughMemoryError: more than 64 steps would be needed.
    """
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
    """1 if the scores fit `limit_mib`; otherwise the power of two above their quotient."""
    size = shape.scores_bytes // 2**20
    if size <= limit_mib:
        return 1
    if limit_mib <= 0:
        raise not_enough("invokeai", shape.scores_bytes, 0, shape, 0, "Free memory on the device")
    return 1 << int((size - 1) / limit_mib).bit_length()


def doggettx(shape: AttentionShape, given: Conditions) -> Slices:
    """Decides as the webui's Doggettx optimisation."""
    return balanced_rows(shape, _webui_steps(shape, given.free_bytes))


def heuristic(shape: AttentionShape, given: Conditions) -> Slices:
    """Doggettx with a safety factor of 3.3 for the free memory, a limit for the caches of CPUs, and `mps` on Metal."""
    if given.device_type == "mps":
        return mps(shape, given)
    steps = _webui_steps(shape, given.free_bytes / SAFETY_FACTOR)
    if given.device_type == "cpu":
        steps = max(steps, _invokeai_division(shape, CPU_SLICE_MIB))
    return balanced_rows(shape, steps)


def invokeai(shape: AttentionShape, given: Conditions) -> Slices:
    """Slices of batch x heads, or of query rows if single heads are too large. On a CPU at most 32 MiB of scores."""
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
    """The rule for Metal: by the rows of all heads, whatever is free, and never a multiple of 4096 rows in a slice."""
    rows_of_all_heads = shape.batch_heads * shape.queries
    if rows_of_all_heads <= 2**16:
        return whole(shape)
    rows = 2**30 // rows_of_all_heads
    if rows % 4096 == 0:
        rows -= 1  # exact multiples of 4096 trip the Metal allocator
    return Slices("query", shape.batch_heads, min(max(rows, 1), shape.queries))


def square_resolution(available: float, per_token_pair: float) -> int:
    """Side in pixels, a multiple of 64, of the largest square image for whose `N * N` scores there is memory.

    A score takes `per_token_pair` bytes, and `N = (side / 8) ** 2` is the number of latent pixels. The webui's formula,
    `floor(sqrt(sqrt(available / 2.5)) / 8) * 64`, is this one with 2.5 bytes for a score.
    """
    return math.floor(math.sqrt(math.sqrt(max(0.0, available) / per_token_pair)) / 8) * 64
