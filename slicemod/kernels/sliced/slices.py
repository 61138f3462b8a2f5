"""The input and the answer of a policy: the conditions of a call, and the slices to compute it in."""

from __future__ import annotations

from typing import NamedTuple

from slicemod.call import AttentionShape
from slicemod.kernels.sliced.products import products_of
from slicemod.kernels.sliced.tiles import Tiles, head_slices
from slicemod.plan import BUFFER_CAPS, Axis
from slicemod.rounding import ceil_div


class Slices(NamedTuple):
    """A policy's answer.

    Attributes:
        axis: what is sliced, "query" or "heads".
        heads: the most batch x heads of a slice; it has those of whole batch items, or some of one item.
        rows: query rows of a slice.
        keys: keys of a chunk; 0 for all keys at once.
    """

    axis: Axis
    heads: int
    rows: int
    keys: int = 0

    def steps(self, shape: AttentionShape) -> int:
        """How many slices the call has."""
        chunks = ceil_div(shape.keys, self.keys) if self.keys else 1
        return max(1, head_slices(shape, self.heads) * ceil_div(shape.queries, max(1, self.rows)) * chunks)


class Conditions(NamedTuple):
    """What a policy knows besides the sizes of the call.

    Attributes:
        free_bytes: bytes that the attention may allocate.
        device_type: "cpu", "cuda", "mps" and so on.
        training: there will be a backward pass.
        checkpoint: the backward pass recomputes each slice.
    """

    free_bytes: int
    device_type: str
    training: bool
    checkpoint: bool

    def tiles(self, shape: AttentionShape, heads: int, rows: int, items: int = 1, keys: int = 0) -> Tiles:
        """The tiles of a slice on this type of device."""
        products = products_of(self.device_type, shape.itemsize, shape.head_dim)
        return Tiles.of_slice(shape, heads, rows, items, keys, products)

    def peak(self, tiles: Tiles) -> int:
        """Peak bytes of a call in these tiles."""
        return tiles.peak(training=self.training, checkpoint=self.checkpoint)

    def affords(self, tiles: Tiles) -> bool:
        """The tiles fit the free bytes, and the device allows them."""
        return self.peak(tiles) <= self.free_bytes and self.allows(tiles)

    def allows(self, tiles: Tiles) -> bool:
        """No buffer is larger than the device allows (`BUFFER_CAPS`), and there are no more scores at a time."""
        largest = tiles.largest_buffer(training=self.training, checkpoint=self.checkpoint)
        most_scores = tiles.products.most_scores
        kept = 0 if self.checkpoint or not self.training else tiles.shape.scores_bytes // tiles.shape.score_itemsize
        few = most_scores is None or max(tiles.scores, kept) <= most_scores
        return few and largest <= BUFFER_CAPS.get(self.device_type, largest)


def whole(shape: AttentionShape) -> Slices:
    """The call in one slice."""
    return Slices("query", shape.batch_heads, shape.queries)


def balanced_rows(shape: AttentionShape, steps: int) -> Slices:
    """All heads, and the rows in `steps` slices of one size; the last slice may be smaller."""
    return Slices("query", shape.batch_heads, max(1, ceil_div(shape.queries, steps)))
