"""`exact`: the slices whose true peak fits and that run at full speed, without a guessed multiplier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from slicemod.call import AttentionShape
from slicemod.kernels.sliced.slices import Conditions, Slices, whole
from slicemod.kernels.sliced.tiles import Tiles, heads_at_once
from slicemod.plan import NotEnoughMemoryError, largest_square, not_enough

# Scores of one turn of the loop on a CPU: between 4 and 8 MiB they stay in the last-level cache from one pass to the
# next; at 32 MiB the same attention was measured 10-20% slower.
CPU_CACHED_SCORES = 8 * 2**20
CPU_LEAST_ROWS = 16  # fewer rows than this cost more in dispatch than the cache gives back

# Scores of one turn on a wide device, as many as 8 heads of 1024 queries by 1024 keys in float32: an estimate, from the
# blocks of some 128 x 64 numbers in which a GPU computes a product and the number of its processors; not measured.
WIDE_SCORES = 32 * 2**20
WIDE_LEAST_SIDE = 256  # of a square chunk; smaller ones leave the processors idle

# Rows of all keys below which as much memory goes further in chunks of keys, in inference and in training, where the
# chunks are gone through twice. Measured with 16384 keys: 4 rows took twice the time of chunks 256 x 256, 16 less.
FEW_ROWS = {False: 16, True: 8}
CHUNKS_FOR_ROWS = 1.5  # slices of chunks that take no longer than one slice of few rows

WELL_USED = 0.8  # of the budget; slices that use less of it are enlarged if that takes no more of them


def exact(shape: AttentionShape, given: Conditions) -> Slices:
    """The fewest slices whose true peak fits, of those that are no larger than what runs at full speed.

    On a CPU whole heads or rows of heads, whose scores stay in its cache, and chunks of keys where few rows of one head
    fit. On a wide device all heads and square chunks, which give it the most to do at a time for the memory they take.
    """
    on_cpu = given.device_type == "cpu"
    most_scores = CPU_CACHED_SCORES if on_cpu else WIDE_SCORES  # bytes
    chunks_allowed = given.checkpoint or not given.training  # the weights that are kept otherwise need all keys

    def fits(heads: int, rows: int, keys: int = 0) -> bool:
        tiles = Tiles.of_slice(shape, heads, rows, keys=keys)
        small = rows <= CPU_LEAST_ROWS or tiles.scores * tiles.shape.score_itemsize <= most_scores
        return small and given.affords(tiles)

    if shape.batch_heads == 0 or shape.queries == 0 or fits(shape.batch_heads, shape.queries):
        return whole(shape)
    if not on_cpu and chunks_allowed and (square := _square_chunks(shape, fits)) is not None:
        return square
    best: Slices | None = None
    for slices in _blocks(shape, fits, given):
        best = best or slices
        if _uses_well(shape, given, slices) and slices.steps(shape) <= best.steps(shape):
            return slices
    if best is not None:
        return best
    rows = Slices("query", 1, most_that_fits(shape.queries, lambda rows: fits(1, rows)))
    if chunks_allowed:
        side = most_that_fits(min(shape.queries, shape.keys - 1), lambda side: fits(1, side, side))
        chunks = Slices("query", 1, side, most_that_fits(shape.keys - 1, lambda keys: fits(1, side, keys)))
        if side and (not rows.rows or chunks.steps(shape) <= CHUNKS_FOR_ROWS * rows.steps(shape)):
            return chunks
    if rows.rows:
        return rows
    raise _too_small_for_a_row(shape, given)


def _square_chunks(shape: AttentionShape, fits: Callable[[int, int, int], bool]) -> Slices | None:
    """As many queries as keys at a time, of as many heads of an item as leave squares that are worth it.

    Only where an item has more scores than keep the device busy: a row of all keys does no harm in smaller ones.
    """
    if shape.heads * shape.queries * shape.keys * shape.score_itemsize <= WIDE_SCORES:
        return None
    for heads in range(shape.heads, 0, -1):
        side = most_that_fits(min(shape.queries, shape.keys - 1), lambda side, heads=heads: fits(heads, side, side))  # type: ignore[misc]
        if side < min(WIDE_LEAST_SIDE, shape.queries):
            continue
        keys = most_that_fits(shape.keys - 1, lambda keys, heads=heads, side=side: fits(heads, side, keys))  # type: ignore[misc]
        at_once = heads_at_once(shape, heads)
        rows = most_that_fits(shape.queries, lambda rows, at_once=at_once, keys=keys: fits(at_once, rows, keys))  # type: ignore[misc]
        return Slices("query", shape.batch_heads if heads == shape.heads else at_once, rows, keys)
    return None


def _blocks(shape: AttentionShape, fits: Callable[[int, int], bool], given: Conditions) -> Iterator[Slices]:
    """Whole heads and enough rows of heads that fit, the best ones for the device first."""
    counts: Sequence[int] = range(shape.heads, 0, -1)  # a wide device wants every head in each launch
    if given.device_type == "cpu":  # a product per head keeps the cores busy
        most = most_that_fits(shape.heads, lambda heads: fits(heads, shape.queries))
        if most:
            yield Slices("heads", heads_at_once(shape, most), shape.queries)
        counts = range(most + 1, shape.heads + 1)
    for heads in counts:
        rows = most_that_fits(shape.queries, lambda rows, heads=heads: fits(heads, rows))  # type: ignore[misc]
        if rows >= min(FEW_ROWS[given.training], shape.queries):
            yield Slices("query", shape.batch_heads if heads == shape.heads else heads_at_once(shape, heads), rows)


def _uses_well(shape: AttentionShape, given: Conditions, slices: Slices) -> bool:
    """Slices use the budget, or could use more of it and had better not."""
    tiles = Tiles.of_slice(shape, slices.heads, slices.rows)
    if slices.axis == "heads":
        larger = Tiles.of_slice(shape, slices.heads + shape.group, slices.rows)
    else:
        larger = Tiles.of_slice(shape, slices.heads, slices.rows + 1)
    return given.peak(tiles) >= WELL_USED * given.free_bytes or given.affords(larger)


def most_that_fits(size: int, fits: Callable[[int], bool]) -> int:
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
    advice = "Set checkpoint=True, raise the budget" if given.training and not given.checkpoint else "Raise the budget"
    return not_enough("exact", given.peak(least(shape)), given.free_bytes, shape, side, advice)
