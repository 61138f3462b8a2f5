"""The workspace of the sliced kernel: which tiles a turn of the loop needs, and how many bytes they are.

The planner adds the tiles up and the loop allocates the same tiles: one list serves both, so that a plan cannot promise
other bytes than the loop takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slicemod.call import AttentionShape
from slicemod.rounding import round_up

# Scores of batch items that are computed together; an item with more is a turn of its own. A turn costs some 100
# microseconds of dispatch, which this many scores take as well.
_SMALL_SCORES = 2**18

# CUDA launches batched matrix products on a grid whose third dimension has 16 bits.
_MOST_PRODUCTS = 65_535

# PyTorch makes a tensor of a Python number, such as the scale, once in float64 and once in the other operand's dtype.
_SCALAR_BYTES = 16
_SEED_BYTES = 8

_LINE = 16  # floats of a cache line; each tile starts at one


def heads_at_once(shape: AttentionShape, heads: int) -> int:
    """Most heads that one turn of the loop covers when a slice has `heads` of the `B*H`.

    Heads of one batch item, since those of two share no stride in a layer's layout. A turn takes whole groups of
    heads that share a key head, or stays within one group.
    """
    most = max(1, min(heads, shape.heads, _MOST_PRODUCTS))
    return most if most <= shape.group else most - most % shape.group


def items_at_once(shape: AttentionShape, heads: int, rows: int) -> int:
    """Batch items that one turn of the loop had better cover, memory allowing.

    One, but for small ones that lie in a slice whole: their keys and values are gathered then, which costs less
    than a turn for each.
    """
    if heads < 2 * max(1, shape.heads) or rows < shape.queries or heads_at_once(shape, heads) < shape.heads:
        return 1
    together = max(1, _SMALL_SCORES // max(1, shape.heads * shape.queries * shape.keys))
    return min(heads // shape.heads, shape.batch, together)


@dataclass(frozen=True)
class Tiles:
    """The workspace of the sliced kernel: elements of each tile, for one turn of the loop.

    A turn covers `items` batch items by `heads` heads by `rows` rows, and all keys or `keys` of them after another,
    if that is not 0. The tiles have the dtype of the scores; a tile of 0 elements is not used.
    """

    shape: AttentionShape
    heads: int
    rows: int
    items: int = 1
    keys: int = 0

    @classmethod
    def of_slice(cls, shape: AttentionShape, heads: int, rows: int, items: int = 1, keys: int = 0) -> Tiles:
        """The tiles of a slice of `heads` of the `B*H` by `rows` rows that computes `items` batch items together.

        Of `keys` keys at a time if that is not 0; sums over the chunks of half precision are kept in float32.
        """
        keys = keys if 0 < keys < shape.keys else 0
        if keys:
            shape = replace(shape, upcast=True)
        return cls(shape, heads_at_once(shape, heads), max(1, min(rows, shape.queries)), items, keys)

    @property
    def _all_heads(self) -> int:
        return self.items * self.heads

    @property
    def _all_key_heads(self) -> int:
        return self.items * max(1, self.heads // self.shape.group)

    @property
    def keys_at_once(self) -> int:
        """Keys `m` of a chunk, or all of them."""
        return self.keys or self.shape.keys

    @property
    def converts(self) -> bool:
        """Scores have another dtype than the inputs."""
        return self.shape.score_itemsize != self.shape.itemsize

    @property
    def stages(self) -> bool:
        """Products go through a tile: of another dtype, of a group or of several items, they have no one place."""
        return self.converts or self.shape.group > 1 or self.items > 1

    @property
    def gathers(self) -> bool:
        """Key and value go through a tile: of another dtype, of several items, or of strides no product reads."""
        return self.converts or self.shape.irregular or self.items > 1

    @property
    def accumulates(self) -> bool:
        """Gradients of key and value are summed in a tile rather than in their place."""
        return self.converts or self.items > 1

    @property
    def scores(self) -> int:
        """`(items * heads, rows, m)`: scores, then weights."""
        return self._all_heads * self.rows * self.keys_at_once

    @property
    def query(self) -> int:
        """`(items * heads, rows, D)`: the scaled query."""
        return self._all_heads * self.rows * self.shape.head_dim

    @property
    def output(self) -> int:
        """`(items * heads, rows, Dv)`."""
        return self._all_heads * self.rows * self.shape.values

    @property
    def key(self) -> int:
        """`(items * key heads, m, D)`."""
        return self._all_key_heads * self.keys_at_once * self.shape.head_dim

    @property
    def value(self) -> int:
        """`(items * key heads, m, Dv)`."""
        return self._all_key_heads * self.keys_at_once * self.shape.values

    @property
    def mask(self) -> int:
        """The additive form of the mask's slice, or the sum of its gradient, before broadcasting."""
        if self.shape.causal:
            return self.rows * self.keys_at_once
        mask = self.shape.mask
        if mask is None or not (mask.is_bool or mask.other_dtype or mask.has_grad or self.converts):
            return 0
        items, heads = (self.items if mask.batch > 1 else 1), (self.heads if mask.heads > 1 else 1)
        keys = self.keys_at_once if mask.keys > 1 else 1
        return items * heads * (self.rows if mask.queries > 1 else 1) * keys

    @property
    def row_maximum(self) -> int:
        """`(items * heads, rows, 1)`: finds the rows that a mask leaves without a key."""
        return self._all_heads * self.rows if self.shape.mask is not None else 0

    @property
    def row_statistics(self) -> int:
        """`(4, items * heads, rows, 1)`: what a softmax over chunks of keys carries from one to the next."""
        return 4 * self._all_heads * self.rows if self.keys else 0

    @property
    def forward(self) -> dict[str, int]:
        """Elements of each tile of the forward pass."""
        sizes = {
            "query": self.query,
            "scores": self.scores,
            "mask": self.mask,
            "row_maximum": 0 if self.keys else self.row_maximum,
            "row_statistics": self.row_statistics,
        }
        if self.shape.dropout:
            sizes["dropout"] = self.scores
        if self.stages:
            sizes["output"] = self.output
        if self.gathers:
            sizes |= {"key": self.key, "value": self.value}
        return {name: _in_lines(size) for name, size in sizes.items()}

    @property
    def backward(self) -> dict[str, int]:
        """Elements of each tile of the backward pass, which computes the weights once more."""
        # The kernel takes the tile of the output's gradient for a number for each row in the end, on some devices.
        output = max(self.output, self._all_heads * self.rows)
        sizes = self.forward | {"output": _in_lines(output), "grad_scores": _in_lines(self.scores)}
        if self.stages:
            sizes["grad_query"] = _in_lines(self.query)
        if self.keys:
            sizes["row_product"] = _in_lines(self._all_heads * self.rows)
        if self.accumulates:  # over all keys, as each turn adds to every chunk
            all_keys = self._all_key_heads * self.shape.keys
            sizes |= {
                "grad_key": _in_lines(all_keys * self.shape.head_dim),
                "grad_value": _in_lines(all_keys * self.shape.values),
            }
        return sizes

    def workspace(self, *, training: bool) -> int:
        """Bytes of the one buffer that holds all tiles."""
        return sum((self.backward if training else self.forward).values()) * self.shape.score_itemsize

    def largest_buffer(self, *, training: bool, checkpoint: bool = True) -> int:
        """Bytes of the largest single allocation: the workspace, or the weights that are kept."""
        kept = 0 if checkpoint or not training else self.shape.scores_bytes
        return max(self.workspace(training=training), kept)

    def peak(self, *, training: bool, checkpoint: bool = True) -> int:
        """Peak bytes beyond inputs, output and input gradients.

        `training` counts the backward pass; without `checkpoint` the weights of all slices live on between the two.
        """
        rest = self.row_maximum + _SCALAR_BYTES  # the rows without a key are marked by a bool each
        if self.shape.dropout:
            rest += _SEED_BYTES
        if training and not checkpoint:
            rest += self.shape.scores_bytes
        mask = self.shape.mask
        if training and self.converts and mask is not None and mask.has_grad:
            rest += mask.elements * self.shape.score_itemsize  # its gradient is summed in the dtype of the scores
        return self.workspace(training=training) + rest


def _in_lines(elements: int) -> int:
    return round_up(elements, _LINE)
