"""Plans: how many slices an attention call is computed in, decided from its sizes and the bytes that are free.

A policy is a pure function over ints that answers how many heads and rows a slice has; `POLICIES` lists them. The
arithmetic of `heuristic`, `doggettx`, `invokeai` and `mps` is that of AUTOMATIC1111's webui (its attention
optimisations of those names); `exact` is slicemod's own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from slicemod.shapes import AttentionShape, Tiles, ceil_div, square_resolution

Axis = Literal["query", "heads"]
Kernel = Literal["fused", "math", "bf16"]
Policy = Literal["heuristic", "doggettx", "invokeai", "mps", "exact"]

SAFETY_FACTOR = 3.3  # covers fragmentation and concurrent allocations
MOST_STEPS = 64  # what the webui gives up at
CPU_SLICE_MIB = 32  # InvokeAI: smaller slices are faster due to L2/L3 caches

# Scores of one turn of the loop on a CPU: between 4 and 8 MiB they stay in the last-level cache from one pass to the
# next; at 32 MiB the same attention was measured 10-20% slower.
CPU_CACHED_SCORES = 8 * 2**20
CPU_LEAST_ROWS = 16  # fewer rows than this cost more in dispatch than the cache gives back

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
        kernel: "fused", PyTorch's own fused attention; "math", the sliced one; or "bf16", the sliced one for CPUs that
            multiply bfloat16.
        policy: the policy that decided, or "pinned" where the number of steps was given.
        heads: batch x heads of a slice.
        rows: query rows of a slice.
        checkpoint: the backward pass recomputes each slice; otherwise the weights of all slices are kept for it.
        upcast: tiles are float32 where the inputs have half precision; a fused kernel then takes some heads at a time.
        items: batch items that are computed together; more than one where they are small.
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

    def __str__(self) -> str:
        if self.kernel == "fused":
            return f"fused, {self.peak_bytes:,} bytes ({self.policy})"
        slices = f"{self.steps} x {self.slice_size} {'rows' if self.axis == 'query' else 'heads'}"
        kernel = "" if self.kernel == "math" else f"{self.kernel}, "
        return f"{kernel}{slices}, {self.peak_bytes:,} bytes ({self.policy})"


class Slices(NamedTuple):
    """What a policy answers: the axis it slices, and the batch x heads and query rows of a slice."""

    axis: Axis
    heads: int
    rows: int


class Conditions(NamedTuple):
    """What a policy knows besides the sizes."""

    free_bytes: int
    device_type: str
    training: bool
    checkpoint: bool


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
        raise NotEnoughMemoryError(
            f"invokeai: needs memory for scores of {shape.scores_bytes:,} bytes and has none free, for {shape}. "
            "Free memory on the device or name a budget in bytes."
        )
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
    """The fewest slices whose true peak fits; on a CPU, slices that stay in its cache."""

    def fits(heads: int, rows: int) -> bool:
        tiles = Tiles.of_slice(shape, heads, rows)
        if tiles.peak(training=given.training, checkpoint=given.checkpoint) > given.free_bytes:
            return False
        scores = tiles.scores * shape.score_itemsize
        if given.device_type == "cpu" and rows > CPU_LEAST_ROWS and scores > CPU_CACHED_SCORES:
            return False
        return scores <= BUFFER_CAPS.get(given.device_type, scores)

    if shape.batch_heads == 0 or shape.queries == 0 or fits(shape.batch_heads, shape.queries):
        return _whole(shape)
    if given.device_type == "cpu":  # a product per head keeps both cores busy: whole heads, as many as fit
        heads = _most(shape.batch_heads, lambda heads: fits(heads, shape.queries))
        if heads:
            return Slices("heads", shape.heads_at_once(heads), shape.queries)
    else:  # a wide device wants every head in each launch
        rows = _most(shape.queries, lambda rows: fits(shape.batch_heads, rows))
        if rows:
            return Slices("query", shape.batch_heads, _aligned(rows, shape.queries))
    rows = _most(shape.queries, lambda rows: fits(1, rows))
    if rows:
        return Slices("query", 1, _aligned(rows, shape.queries))
    raise _too_small_for_a_row(shape, given)


def _most(size: int, fits: Callable[[int], bool]) -> int:
    """Largest of 1..size that fits, or 0; what fits stays so when made smaller."""
    least, most = 0, size
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _aligned(rows: int, queries: int) -> int:
    """Whole vector registers of rows, where that takes no further slice."""
    fewer = rows - rows % 16
    return fewer if fewer and ceil_div(queries, fewer) == ceil_div(queries, rows) else rows


def _too_small_for_a_row(shape: AttentionShape, given: Conditions) -> NotEnoughMemoryError:
    def row_peak(shape: AttentionShape) -> int:
        return Tiles(shape, 1, 1).peak(training=given.training, checkpoint=given.checkpoint)

    side = 0
    while side < 2**16:
        tokens = ((side + 64) // 8) ** 2
        if row_peak(replace(shape, queries=tokens, keys=tokens)) > given.free_bytes:
            break
        side += 64
    knob = "" if given.checkpoint or not given.training else ", set checkpoint=True"
    return NotEnoughMemoryError(
        f"exact: one row of one head needs {row_peak(shape):,} bytes, the budget has {given.free_bytes:,}, "
        f"for {shape}. Raise the budget{knob} or lower the resolution: at most about {side}x{side} would fit."
    )


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
            f"free_bytes: expected a number of bytes; got {free_bytes!r}. slicemod.budget.parse_budget reads sizes "
            'such as "1GiB".'
        )
    free_bytes = max(0, free_bytes)
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected a whole number of slices, 1 or more; got {steps}. Leave it out to plan.")
    if kernel == "fused":
        peak = fused_peak(shape, device_type, training=training)
        return SlicePlan("query", 1, shape.queries, peak, "fused", policy, shape.batch_heads, shape.queries)
    if steps is not None:
        chosen, policy = _balanced_rows(shape, steps), "pinned"
    else:
        chosen = POLICIES[policy](shape, Conditions(free_bytes, device_type, training, checkpoint))
    axis, heads, rows = chosen
    items = shape.items_at_once(heads, rows)
    tiles = Tiles.of_slice(shape, heads, rows, items)
    if items > 1 and tiles.peak(training=training, checkpoint=checkpoint) > free_bytes:
        tiles = Tiles.of_slice(shape, heads, rows)
    turns = ceil_div(shape.batch_heads, max(1, heads)) * ceil_div(shape.queries, max(1, rows))
    return SlicePlan(
        axis=axis,
        steps=max(1, turns),
        slice_size=rows if axis == "query" else heads,
        peak_bytes=tiles.peak(training=training, checkpoint=checkpoint),
        kernel="math",
        policy=policy,
        heads=heads,
        rows=rows,
        items=tiles.items,
        checkpoint=checkpoint,
        upcast=shape.upcast,
    )


def fused_peak(shape: AttentionShape, device_type: str, *, training: bool, packs: bool = False) -> int:
    """Peak bytes of PyTorch's fused attention beyond inputs, output and input gradients.

    Measured on the CPU, where `packs` says that it multiplies bfloat16 natively. Elsewhere what flash attention is
    known to keep: the log-sum-exp of each row and, in training, the row sums and a float32 gradient of the query.
    """
    if device_type == "cpu":
        return shape.flash_peak(torch.get_num_threads(), training=training, packs=packs)
    rows = shape.batch_heads * shape.queries
    return rows * 4 * (1 + (1 + shape.head_dim if training else 0))
