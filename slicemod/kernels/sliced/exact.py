"""The policy `exact`: slices whose true peak fits the budget, and which are no larger than what runs at full speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from slicemod.call import AttentionShape
from slicemod.kernels.sliced.slices import Conditions, Slices, whole
from slicemod.kernels.sliced.tiles import Tiles, heads_at_once
from slicemod.plan import NotEnoughMemoryError, largest_square, not_enough

# Bytes of scores in one turn of the loop on a CPU. 4 to 8 MiB stay in the last-level cache from one operation on them
# to the next. On two cores in November 2026, 32 MiB took 10-20% longer than 8; on two busy cores of an AMD EPYC (Zen 4)
# they took as long.
CPU_CACHED_SCORES = 8 * 2**20
CPU_LEAST_ROWS = 16  # with fewer rows, the calls of PyTorch cost more than the cache saves

# Bytes of scores in one turn on other devices: 8 heads of 1024 queries by 1024 keys in float32. This is an estimate,
# from the blocks of some 128 x 64 numbers in which a GPU computes a product, and from the number of its processors. It
# was not measured.
WIDE_SCORES = 32 * 2**20
WIDE_LEAST_SIDE = 256  # of a square chunk; an estimate too: smaller squares leave processors idle

# With fewer rows of all keys than this, chunks of keys use the same memory better. The first number is for inference,
# the second for training, where the chunks are computed twice. Measured on two cores in November 2026 with 16384 keys:
# rows of 4 took twice the time of chunks of 256 x 256, rows of 16 less time than these. On two busy cores of an AMD
# EPYC (Zen 4) rows of 4, 8 and 16 took 2.3, 1.7 and 1.3 times the time of the chunks.
FEW_ROWS = {False: 16, True: 8}
CHUNKS_FOR_ROWS = 1.5  # chunks of keys are taken if they are at most this many times the number of slices of few rows

WELL_USED = 0.8  # of the budget; slices that use less are made larger if their number does not grow


def exact(shape: AttentionShape, given: Conditions) -> Slices:
    """The fewest slices whose true peak fits the free bytes, and which are no larger than what runs at full speed.

    On a CPU a slice is some heads, or some rows of heads, and its scores stay in the cache. If only few rows of one
    head fit, the keys are split into chunks too. On other devices a slice has all heads if possible, and square chunks
    of queries by keys, which give the device the most work at a time for the memory that they take.

    Raises:
        NotEnoughMemoryError: not even one row and one key fit.
    """
    on_cpu = given.device_type == "cpu"
    most_scores = CPU_CACHED_SCORES if on_cpu else WIDE_SCORES  # bytes
    chunks_allowed = given.checkpoint or not given.training  # weights that are kept need all keys

    def fits(heads: int, rows: int, keys: int = 0) -> bool:
        tiles = given.tiles(shape, heads, rows, keys=keys)
        small = rows <= CPU_LEAST_ROWS or tiles.scores * tiles.shape.score_itemsize <= most_scores
        return small and given.affords(tiles)

    if shape.batch_heads == 0 or shape.queries == 0 or fits(shape.batch_heads, shape.queries):
        return whole(shape)
    if not on_cpu and chunks_allowed and (square := _square_chunks(shape, fits)) is not None:
        return square
    if blocks := list(_blocks(shape, fits, given)):
        most = blocks[0].steps(shape) if on_cpu else min(slices.steps(shape) for slices in blocks)
        few = [slices for slices in blocks if slices.steps(shape) <= most]
        return next((slices for slices in few if _uses_well(shape, given, slices)), few[0])
    rows = Slices("query", 1, most_that_fits(shape.queries, lambda rows: fits(1, rows)))
    if chunks_allowed:
        chunks = _chunks_of_a_head(shape, fits)
        if chunks.rows and (not rows.rows or chunks.steps(shape) <= CHUNKS_FOR_ROWS * rows.steps(shape)):
            return chunks
    if rows.rows:
        return rows
    raise _too_small_for_a_row(shape, given)


def _chunks_of_a_head(shape: AttentionShape, fits: Callable[[int, int, int], bool]) -> Slices:
    """As many rows of one head as keys at a time; fewer rows as long as half of them need half as many chunks.

    If little memory is left beside the query and the output of many rows, it holds few keys. No rows if nothing fits.
    """

    def chunks(rows: int) -> Slices:
        return Slices("query", 1, rows, most_that_fits(shape.keys - 1, lambda keys: fits(1, rows, keys)))

    best = chunks(most_that_fits(min(shape.queries, shape.keys - 1), lambda side: fits(1, side, side)))
    while best.rows > 1 and 2 * (half := chunks(best.rows // 2)).steps(shape) <= best.steps(shape):
        best = half
    return best


def _square_chunks(shape: AttentionShape, fits: Callable[[int, int, int], bool]) -> Slices | None:
    """As many queries as keys at a time, for as many heads of one batch item as leave squares that are large enough.

    None if an item has few scores, which can be computed in rows of all keys, or if no square is large enough.
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
    """Slices that fit, of whole heads or of enough rows of some heads. The best ones for the device come first."""
    counts: Sequence[int] = range(shape.heads, 0, -1)  # a GPU works best on all heads at a time
    if given.device_type == "cpu":  # the product of one head keeps the cores busy
        most = most_that_fits(shape.heads, lambda heads: fits(heads, shape.queries))
        if most:
            yield Slices("heads", heads_at_once(shape, most), shape.queries)
        counts = range(most + 1, shape.heads + 1)
    for heads in counts:
        rows = most_that_fits(shape.queries, lambda rows, heads=heads: fits(heads, rows))  # type: ignore[misc]
        if rows >= min(FEW_ROWS[given.training], shape.queries):
            yield Slices("query", shape.batch_heads if heads == shape.heads else heads_at_once(shape, heads), rows)
        if rows == shape.queries and given.device_type != "cpu":
            return  # fewer heads would be more slices


def _uses_well(shape: AttentionShape, given: Conditions, slices: Slices) -> bool:
    """Whether the slices use most of the budget, or would still fit with one more row or head."""
    tiles = given.tiles(shape, slices.heads, slices.rows)
    if slices.axis == "heads":
        larger = given.tiles(shape, slices.heads + shape.group, slices.rows)
    else:
        larger = given.tiles(shape, slices.heads, slices.rows + 1)
    return given.peak(tiles) >= WELL_USED * given.free_bytes or given.affords(larger)


def most_that_fits(size: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `size` that fits; 0 if none does. If a number fits, smaller ones have to fit too."""
    least, most = 0, size
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _too_small_for_a_row(shape: AttentionShape, given: Conditions) -> NotEnoughMemoryError:
    def least(shape: AttentionShape) -> Tiles:
        """The smallest slice: one row of one head, with one key if the weights need not be kept."""
        row, score = given.tiles(shape, 1, 1), given.tiles(shape, 1, 1, keys=1)
        if given.training and not given.checkpoint:
            return row
        return min(row, score, key=given.peak)

    side = largest_square(shape, lambda shape: given.affords(least(shape)))
    advice = "Set checkpoint=True, raise the budget" if given.training and not given.checkpoint else "Raise the budget"
    return not_enough("exact", given.peak(least(shape)), given.free_bytes, shape, side, advice)
