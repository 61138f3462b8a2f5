"""Sizes of the bfloat16 kernel: what its workspace takes, and how many rows a turn of it has."""

from dataclasses import dataclass, replace

from slicemod.shapes import AttentionShape

# Columns that a tile has beyond the head: a shift of the scores, and sums over parts of the keys. Eight keep the width
# of the usual heads a multiple of eight, which products are fast with.
EXTRA_COLUMNS = 8

BF16_KEPT_BYTES = 6  # of a row, between forward and backward: its shift, and the inverse sum of its weights

SUM_PARTS = 4  # in so many parts are products added to the gradients of key and value

SAMPLED_KEYS = 64  # a row's shift is found from so many of its keys

# Scores of a turn, 4 MiB: two tiles of them stay in the last-level cache. Two heads were measured to be faster than
# twice the rows, and more heads to be no faster.
_TURN_SCORES = 2**21
_MOST_ROWS = 512
_LEAST_ROWS = 64  # fewer rows than this leave the products slower than PyTorch's fused kernel

_ROW_BYTES = 24  # maximum, shift and sum of a row, and its index where it is computed again

# What oneDNN packs in its products, for each thread: read off torch 2.14.
_PACKED_SCORES = 132_096
_PACKED_ROWS = 66_688


@dataclass(frozen=True)
class Bf16Tiles:
    """The workspace of the bfloat16 kernel: elements of each tile, for turns of `heads` heads by `rows` rows."""

    shape: AttentionShape
    heads: int
    rows: int

    @property
    def width(self) -> int:
        """Columns of the tiles of query and key."""
        return padded(self.shape.head_dim)

    @property
    def value_width(self) -> int:
        """Columns of the tiles of value and output."""
        return padded(self.shape.values)

    @property
    def forward(self) -> dict[str, int]:
        """Elements of the bfloat16 tiles of the forward pass."""
        shape = self.shape
        return {
            "key": self.heads * shape.keys * self.width,
            "value": self.heads * shape.keys * self.value_width,
            "query": self.heads * shape.queries * self.width,
            "scores": self.heads * self.rows * shape.keys,
            "output": self.heads * shape.queries * self.value_width,
        }

    @property
    def backward(self) -> dict[str, int]:
        """Elements of the bfloat16 tiles of the backward pass."""
        shape = self.shape
        return {
            "key": self.heads * shape.keys * self.width,
            "value": self.heads * shape.keys * self.value_width,
            "query": self.heads * self.rows * self.width,
            "grad_output": self.heads * self.rows * self.value_width,
            "scores": self.heads * max(self.rows, self.width) * shape.keys,  # and the gradient of keys
            "grad_scores": self.heads * max(self.rows, self.value_width) * shape.keys,  # and that of values
            "grad_query": self.heads * self.rows * self.width,
        }

    @property
    def sums(self) -> dict[str, int]:
        """Elements of the float32 tiles of the backward pass: the gradients of key and value of a turn's heads."""
        keys = self.heads * self.shape.keys
        return {"grad_key": keys * self.width, "grad_value": keys * self.value_width}

    def peak(self, threads: int, *, training: bool) -> int:
        """Peak bytes beyond inputs, output and input gradients, on `threads` threads.

        Beside the tiles lives one of these at a time: what a product packs, a float32 copy of what is divided, scaled
        or summed, or the rows that are computed again.
        """
        shape = self.shape
        width = max(self.width, self.value_width)
        rows = self.heads * shape.queries
        divided = rows * (4 * shape.values + _ROW_BYTES)
        again = 4 * self.rows * width
        forward = 2 * sum(self.forward.values()) + max(threads * (256 * width + _PACKED_SCORES), divided, again)
        if not training:
            return forward
        kept = shape.batch_heads * shape.queries * BF16_KEPT_BYTES
        scaled = self.heads * self.rows * (8 * shape.values + _ROW_BYTES)
        summed = 4 * self.heads * -(-shape.keys // SUM_PARTS) * width
        packed = threads * ((4 * self.rows + 1088) * width + _PACKED_ROWS)
        backward = 2 * sum(self.backward.values()) + 4 * sum(self.sums.values()) + max(packed, scaled, summed)
        return kept + max(forward, backward)


def padded(width: int) -> int:
    """Columns of a tile for heads of `width`.

    >>> padded(40), padded(64)
    (48, 72)
    """
    return -(-(width + EXTRA_COLUMNS) // 8) * 8


def bf16_tiles(shape: AttentionShape, free_bytes: int, threads: int, *, training: bool) -> Bf16Tiles | None:
    """The turns that suit the cache and fit `free_bytes`, or None where they would be too small to be fast."""
    rows = min(shape.queries, max(_LEAST_ROWS, min(_MOST_ROWS, _TURN_SCORES // max(1, shape.keys))))
    several = shape.group == 1 and 2 * rows * shape.keys <= _TURN_SCORES and shape.heads > 1
    tiles = Bf16Tiles(shape, 2 if several else 1, rows)
    while tiles.peak(threads, training=training) > free_bytes:
        if tiles.heads > 1:
            tiles = replace(tiles, heads=1)
        elif tiles.rows >= 2 * _LEAST_ROWS:
            tiles = replace(tiles, rows=tiles.rows // 2)
        else:
            return None
    return tiles
