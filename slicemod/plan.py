"""Plans: how many slices an attention call is computed in, decided from its sizes and the bytes that are free.

A policy is a pure function over ints that answers how many heads and rows a slice has; `POLICIES` lists them. The
arithmetic of `heuristic`, `doggettx`, `invokeai` and `mps` is that of AUTOMATIC1111's webui (its attention
optimisations of those names); `exact` is slicemod's own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from slicemod.cuda_fused import ASSUMED_PROCESSORS, cuda_fused_peak
from slicemod.onednn_scratch import Products
from slicemod.shapes import AttentionShape, Tiles, ceil_div, square_resolution

Axis = Literal["query", "heads"]
Kernel = Literal["fused", "math", "native"]
Policy = Literal["heuristic", "doggettx", "invokeai", "mps", "exact"]

SAFETY_FACTOR = 3.3  # covers fragmentation and concurrent allocations
MOST_STEPS = 64  # what the webui gives up at
CPU_SLICE_MIB = 32  # InvokeAI: smaller slices are faster due to L2/L3 caches

# Scores of one turn of the loop on a CPU: between 4 and 8 MiB they stay in the last-level cache from one pass to the
# next; at 32 MiB the same attention was measured 10-20% slower.
CPU_CACHED_SCORES = 8 * 2**20
CPU_LEAST_ROWS = 16  # fewer rows than this cost more in dispatch than the cache gives back

# Rows of all keys below which as much memory goes further in chunks of keys, in inference and in training, where the
# chunks are gone through twice. Measured with 16384 keys: 4 rows took twice the time of chunks 256 x 256, 16 less.
FEW_ROWS = {False: 16, True: 8}
CHUNKS_FOR_ROWS = 1.5  # slices of chunks that take no longer than one slice of few rows

WELL_USED = 0.8  # of the budget; slices that use less of it are enlarged if that takes no more of them

# Metal and Level Zero refuse a single buffer above about 4 GiB, whatever is free.
BUFFER_CAPS = {"mps": 4 * 2**30, "xpu": 4 * 2**30}


class NotEnoughMemoryError(RuntimeError):
    """No plan of the policy fits the memory: says what is needed, what is there and what to change."""


@dataclass(frozen=True)
class SlicePlan:
    """How one attention call is computed.

    Attributes:
        axis: what is sliced, "query" rows or batch x "heads".
        steps: how many slices.
        slice_size: query rows, or batch x heads, of a slice; the last slice may be smaller.
        peak_bytes: most bytes that the attention holds beyond its inputs, its output and its input gradients.
        kernel: "fused", PyTorch's own fused attention; "math", the sliced one; or "native", the one that is compiled
            for this CPU.
        policy: the policy that decided, or "pinned" where the number of steps was given.
        heads: batch x heads of a slice, or fewer where the device allows no buffer that large.
        rows: query rows of a slice.
        checkpoint: the backward pass recomputes each slice; otherwise the weights of all slices are kept for it.
        upcast: tiles are float32 where the inputs have half precision; a fused kernel then takes some heads at a time.
        items: batch items that are computed together; more than one where they are small.
        keys: keys of a slice, which carries a running softmax from one chunk of keys to the next; 0 for all keys.
    """

    axis: Axis
    steps: int
    slice_size: int
    peak_bytes: int
    kernel: Kernel
    policy: str
    heads: int
    rows: int
    checkpoint: bool = True
    upcast: bool = False
    items: int = 1
    keys: int = 0

    def __str__(self) -> str:
        if self.kernel == "fused":
            return f"fused, {self.peak_bytes:,} bytes ({self.policy})"
        slices = f"{self.steps} x {self.slice_size} {'rows' if self.axis == 'query' else 'heads'}"
        slices += f" by {self.keys} keys" if self.keys else ""
        kernel = "" if self.kernel == "math" else f"{self.kernel}, "
        return f"{kernel}{slices}, {self.peak_bytes:,} bytes ({self.policy})"


class Slices(NamedTuple):
    """What a policy answers: the axis it slices, and the batch x heads, query rows and keys (0: all) of a slice."""

    axis: Axis
    heads: int
    rows: int
    keys: int = 0


class Conditions(NamedTuple):
    """What a policy knows besides the sizes."""

    free_bytes: int
    device_type: str
    training: bool
    checkpoint: bool

    def peak(self, tiles: Tiles) -> int:
        """Peak bytes of a call in these tiles."""
        return tiles.peak(training=self.training, checkpoint=self.checkpoint)

    def affords(self, tiles: Tiles) -> bool:
        """The tiles fit the free bytes, and each buffer what the device allows one to have."""
        return self.peak(tiles) <= self.free_bytes and self.allows(tiles)

    def allows(self, tiles: Tiles) -> bool:
        """No buffer is larger than the device allows, whatever is free."""
        largest = tiles.largest_buffer(training=self.training, checkpoint=self.checkpoint)
        return largest <= BUFFER_CAPS.get(self.device_type, largest)


def _whole(shape: AttentionShape) -> Slices:
    return Slices("query", shape.batch_heads, shape.queries)


def _balanced_rows(shape: AttentionShape, steps: int) -> Slices:
    return Slices("query", shape.batch_heads, max(1, ceil_div(shape.queries, steps)))


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
        raise _not_enough("invokeai", shape.scores_bytes, 0, shape, 0, "Free memory on the device")
    return 1 << int((size - 1) / limit_mib).bit_length()


def doggettx(shape: AttentionShape, given: Conditions) -> Slices:
    """What the webui's Doggettx optimisation decides."""
    return _balanced_rows(shape, _webui_steps(shape, given.free_bytes))


def heuristic(shape: AttentionShape, given: Conditions) -> Slices:
    """Doggettx with a safety factor of 3.3 on the free memory, a cap for CPU caches, and Metal's own rule."""
    if given.device_type == "mps":
        return mps(shape, given)
    steps = _webui_steps(shape, given.free_bytes / SAFETY_FACTOR)
    if given.device_type == "cpu":
        steps = max(steps, _invokeai_division(shape, CPU_SLICE_MIB))
    return _balanced_rows(shape, steps)


def invokeai(shape: AttentionShape, given: Conditions) -> Slices:
    """Batch x heads first, then query rows; on a CPU at most 32 MiB of scores at a time."""
    if given.device_type == "mps":
        return mps(shape, given)
    limit = CPU_SLICE_MIB if given.device_type == "cpu" else given.free_bytes / SAFETY_FACTOR / 2**20
    division = _invokeai_division(shape, limit)
    if division == 1:
        return _whole(shape)
    if division <= shape.batch_heads:
        return Slices("heads", shape.batch_heads // division, shape.queries)
    return Slices("query", shape.batch_heads, max(shape.queries // division, 1))


def mps(shape: AttentionShape, given: Conditions) -> Slices:
    """At most 2**30 scores at a time on Metal, whatever is free, and never a multiple of 4096 rows."""
    rows_of_all_heads = shape.batch_heads * shape.queries
    if rows_of_all_heads <= 2**16:
        return _whole(shape)
    rows = 2**30 // rows_of_all_heads
    if rows % 4096 == 0:
        rows -= 1  # exact multiples of 4096 trip the Metal allocator
    return Slices("query", shape.batch_heads, min(max(rows, 1), shape.queries))


def exact(shape: AttentionShape, given: Conditions) -> Slices:
    """The fewest slices whose true peak fits; on a CPU, slices that stay in its cache.

    Whole heads or rows of heads, and chunks of keys where few rows of one head fit.
    """

    def fits(heads: int, rows: int, keys: int = 0) -> bool:
        tiles = Tiles.of_slice(shape, heads, rows, keys=keys)
        scores = tiles.scores * shape.score_itemsize
        cached = given.device_type != "cpu" or rows <= CPU_LEAST_ROWS or scores <= CPU_CACHED_SCORES
        return cached and given.affords(tiles)

    if shape.batch_heads == 0 or shape.queries == 0 or fits(shape.batch_heads, shape.queries):
        return _whole(shape)
    best: Slices | None = None
    for slices in _blocks(shape, fits, given):
        best = best or slices
        if _uses_well(shape, given, slices) and _steps(shape, slices) <= _steps(shape, best):
            return slices
    if best is not None:
        return best
    rows = Slices("query", 1, _most(shape.queries, lambda rows: fits(1, rows)))
    if given.checkpoint or not given.training:  # the weights that are kept otherwise take more than a row anyway
        side = _most(min(shape.queries, shape.keys - 1), lambda side: fits(1, side, side))
        chunks = Slices("query", 1, side, _most(shape.keys - 1, lambda keys: fits(1, side, keys)))
        if side and (not rows.rows or _steps(shape, chunks) <= CHUNKS_FOR_ROWS * _steps(shape, rows)):
            return chunks
    if rows.rows:
        return rows
    raise _too_small_for_a_row(shape, given)


def _blocks(shape: AttentionShape, fits: Callable[[int, int], bool], given: Conditions) -> Iterator[Slices]:
    """Whole heads and enough rows of heads that fit, the best ones for the device first."""
    counts: Sequence[int] = range(shape.heads, 0, -1)  # a wide device wants every head in each launch
    if given.device_type == "cpu":  # a product per head keeps the cores busy
        whole = _most(shape.heads, lambda heads: fits(heads, shape.queries))
        if whole:
            yield Slices("heads", shape.heads_at_once(whole), shape.queries)
        counts = range(whole + 1, shape.heads + 1)
    for heads in counts:
        rows = _most(shape.queries, lambda rows, heads=heads: fits(heads, rows))  # type: ignore[misc]
        if rows >= min(FEW_ROWS[given.training], shape.queries):
            yield Slices("query", shape.batch_heads if heads == shape.heads else shape.heads_at_once(heads), rows)


def _uses_well(shape: AttentionShape, given: Conditions, slices: Slices) -> bool:
    """Slices use the budget, or could use more of it and had better not."""
    tiles = Tiles.of_slice(shape, slices.heads, slices.rows)
    if slices.axis == "heads":
        larger = Tiles.of_slice(shape, slices.heads + shape.group, slices.rows)
    else:
        larger = Tiles.of_slice(shape, slices.heads, slices.rows + 1)
    return given.peak(tiles) >= WELL_USED * given.free_bytes or given.affords(larger)


def _steps(shape: AttentionShape, slices: Slices) -> int:
    chunks = ceil_div(shape.keys, slices.keys) if slices.keys else 1
    heads, rows = max(1, slices.heads), max(1, slices.rows)
    return max(1, ceil_div(shape.batch_heads, heads) * ceil_div(shape.queries, rows) * chunks)


def _most(size: int, fits: Callable[[int], bool]) -> int:
    """Largest of 1..size that fits, or 0; what fits stays so when made smaller."""
    least, most = 0, size
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _too_small_for_a_row(shape: AttentionShape, given: Conditions) -> NotEnoughMemoryError:
    def least(shape: AttentionShape) -> Tiles:
        """One row of one head, and one key where these are not all kept for the backward pass."""
        row, score = Tiles.of_slice(shape, 1, 1), Tiles.of_slice(shape, 1, 1, keys=1)
        if given.training and not given.checkpoint:
            return row
        return min(row, score, key=given.peak)

    side = largest_square(shape, lambda shape: given.affords(least(shape)))
    knob = "Set checkpoint=True, raise the budget" if given.training and not given.checkpoint else "Raise the budget"
    return _not_enough("exact", given.peak(least(shape)), given.free_bytes, shape, side, knob)


def _not_enough(who: str, need: int, have: int, shape: AttentionShape, side: int, knob: str) -> NotEnoughMemoryError:
    return NotEnoughMemoryError(
        f"{who}: needs {need:,} bytes and has {have:,}, for {shape}. {knob} or lower the resolution: "
        f"at most about {side}x{side} would fit."
    )


def largest_square(shape: AttentionShape, fits: Callable[[AttentionShape], bool]) -> int:
    """Side in pixels, in steps of 64, of the largest square image whose attention fits; see `AttentionShape.at_side`.

    0 where no image fits, 16384 where any up to there does.
    """
    sides = range(64, 2**14 + 1, 64)
    return next((side - 64 for side in sides if not fits(shape.at_side(side))), sides[-1])


POLICIES: dict[str, Callable[[AttentionShape, Conditions], Slices]] = {
    "heuristic": heuristic,
    "doggettx": doggettx,
    "invokeai": invokeai,
    "mps": mps,
    "exact": exact,
}


def plan_slices(
    shape: AttentionShape,
    free_bytes: int,
    *,
    policy: str = "heuristic",
    device_type: str = "cuda",
    kernel: Kernel = "math",
    training: bool = False,
    checkpoint: bool = True,
    steps: int | None = None,
) -> SlicePlan:
    """Decide how to compute attention of `shape` with `free_bytes` bytes.

    Args:
        shape: sizes of the call.
        free_bytes: bytes that may be allocated beyond inputs and output.
        policy: a key of `POLICIES`.
        device_type: "cuda", "cpu", "mps", ...: some rules depend on it.
        kernel: "math", the sliced kernel; "fused", PyTorch's, which is never sliced.
        training: count the backward pass too.
        checkpoint: the backward pass recomputes each slice.
        steps: number of slices along the queries, instead of what the policy would choose.

    Returns:
        The plan; for a fused kernel one step, whatever the policy.

    Raises:
        NotEnoughMemoryError: the policy has no plan that fits.
        ValueError: an unknown policy or kernel, or `steps` below 1.

    >>> plan_slices(AttentionShape(2, 10, 4096, 4096, 64, 2), 1_825_361_100).steps
    4
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; got {policy!r}. Choose one of these.")
    if kernel not in ("math", "fused"):
        raise ValueError(f'plan_slices: kernel must be "math" or "fused", got {kernel!r}. SliceConfig decides "auto".')
    if isinstance(free_bytes, bool) or not isinstance(free_bytes, int | float):
        raise TypeError(
            f"free_bytes: expected a number of bytes; got {free_bytes!r}. "
            'slicemod.memory.budget.Budget.parse reads sizes such as "1GiB".'
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected a whole number of slices, 1 or more; got {steps}. Leave it out to plan.")
    if kernel == "fused":
        peak = fused_peak(shape, device_type, training=training)
        plan = SlicePlan("query", 1, shape.queries, peak, "fused", policy, shape.batch_heads, shape.queries)
    else:
        given = Conditions(max(0, int(free_bytes)), device_type, training, checkpoint)
        plan = _sliced_plan(shape, given, policy, POLICIES[policy], steps)
    if free_bytes <= 0 < plan.peak_bytes:
        raise _not_enough(policy, plan.peak_bytes, max(0, int(free_bytes)), shape, 0, "Free memory on the device")
    return plan


@lru_cache(maxsize=4096)  # a UNet asks the same for each layer and step
def _sliced_plan(
    shape: AttentionShape,
    given: Conditions,
    policy: str,
    decide: Callable[[AttentionShape, Conditions], Slices],
    steps: int | None,
) -> SlicePlan:
    chosen = decide(shape, given) if steps is None else _balanced_rows(shape, steps)
    axis, heads, rows, keys = chosen
    items = shape.items_at_once(heads, rows)
    tiles = Tiles.of_slice(shape, heads, rows, items, keys)
    if items > 1 and not given.affords(tiles):
        tiles = Tiles.of_slice(shape, heads, rows)
    if not given.allows(tiles):  # the policy's slices, but a turn of the loop takes less of one
        heads = _most(tiles.heads, lambda heads: given.allows(Tiles.of_slice(shape, heads, rows))) or 1
        rows = _most(rows, lambda rows: given.allows(Tiles.of_slice(shape, heads, rows))) or 1
        tiles = Tiles.of_slice(shape, heads, rows)
    return SlicePlan(
        axis=axis,
        steps=_steps(shape, chosen),
        slice_size=chosen.rows if axis == "query" else chosen.heads,
        peak_bytes=given.peak(tiles),
        kernel="math",
        policy=policy if steps is None else "pinned",
        heads=heads,
        rows=rows,
        items=tiles.items,
        keys=tiles.keys,
        checkpoint=given.checkpoint,
        upcast=tiles.shape.upcast,
    )


def fused_peak(
    shape: AttentionShape,
    device_type: str,
    *,
    training: bool,
    products: Products | None = None,
    processors: int = ASSUMED_PROCESSORS,
) -> int:
    """Peak bytes of PyTorch's fused attention beyond inputs, output and input gradients.

    On the CPU `products` says how it multiplies half precision. Elsewhere the most that a CUDA kernel takes, on a
    GPU of so many streaming multiprocessors.
    """
    if device_type == "cpu":
        return shape.flash_peak(torch.get_num_threads(), training=training, products=products)
    return cuda_fused_peak(shape, training=training, processors=processors)
