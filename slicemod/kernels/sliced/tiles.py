"""The workspace of the sliced kernel: which tiles a turn of the loop needs, and how many bytes they have.

The planner adds up the tiles, and the loop allocates them. Both use the one list in here, so that a plan cannot promise
other bytes than the loop takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slicemod.call import AttentionShape
from slicemod.kernels.sliced.products import PLAIN, Products
from slicemod.rounding import ceil_div, round_up

# Batch items are computed together up to this many scores. However few scores a turn of the loop has, it costs about
# 0.1 ms for the calls of PyTorch (0.12 ms on an AMD EPYC in November 2026).
_SMALL_SCORES = 2**18

# Most matrices in one batched product: CUDA's third grid dimension, over which they are launched, has 16 bits.
_MOST_PRODUCTS = 65_535

# PyTorch makes a tensor of a Python number, such as the scale, once in float64 and once in the other operand's dtype.
_SCALAR_BYTES = 16
_SEED_BYTES = 8

_LINE = 16  # float32 numbers in a cache line; each tile starts at a line


def heads_at_once(shape: AttentionShape, heads: int) -> int:
    """The most heads that one turn of the loop computes if a slice has `heads` of the `B*H` heads.

    They are heads of one batch item, because the heads of two items have no common stride in a layer's layout. If heads
    share key heads, a turn takes whole groups of such heads, or stays within one group.
    """
    most = max(1, min(heads, shape.heads, _MOST_PRODUCTS))
    return most if most <= shape.group else most - most % shape.group


def heads_of_slice(shape: AttentionShape, heads: int) -> int:
    """The heads that a slice of at most `heads` of the `B*H` heads has: whole batch items, or a part of one item."""
    return heads_at_once(shape, heads) if heads < shape.heads else heads - heads % max(1, shape.heads)


def head_slices(shape: AttentionShape, heads: int) -> int:
    """In how many slices of at most `heads` heads, as `heads_of_slice` has them, the `B*H` heads are computed."""
    if heads >= shape.batch_heads:
        return 1
    if heads >= shape.heads:
        return ceil_div(shape.batch, heads // shape.heads)
    at_once = heads_at_once(shape, heads)
    if at_once > shape.group:
        return shape.batch * ceil_div(shape.heads, at_once)
    return shape.batch * shape.heads // shape.group * ceil_div(shape.group, at_once)


def items_at_once(shape: AttentionShape, heads: int, rows: int) -> int:
    """How many batch items one turn of the loop should compute together, if the memory allows it.

    It is one item, unless several small items are in a slice as a whole. Their keys and values are then copied
    together, which takes less time than a turn for each item.
    """
    if heads < 2 * max(1, shape.heads) or rows < shape.queries or heads_at_once(shape, heads) < shape.heads:
        return 1
    together = max(1, _SMALL_SCORES // max(1, shape.heads * shape.queries * shape.keys))
    return min(heads // shape.heads, shape.batch, together)


@dataclass(frozen=True)
class Tiles:
    """The workspace of the sliced kernel: the number of elements of each tile, for one turn of the loop.

    A turn computes `items` batch items by `heads` heads by `rows` rows. It has all keys at once, or `keys` keys at a
    time if that is not 0. The tiles have the dtype of the scores. A tile with 0 elements is not used.
    """

    shape: AttentionShape
    heads: int
    rows: int
    items: int = 1
    keys: int = 0
    products: Products = PLAIN

    @classmethod
    def of_slice(
        cls,
        shape: AttentionShape,
        heads: int,
        rows: int,
        items: int = 1,
        keys: int = 0,
        products: Products = PLAIN,
    ) -> Tiles:
        """The tiles for a slice of `heads` of the `B*H` heads by `rows` rows.

        Args:
            shape: sizes of the call.
            heads: batch x heads of the slice.
            rows: query rows of the slice.
            items: batch items that are computed together.
            keys: keys of a chunk; 0 for all. With chunks, half precision is summed in float32.
            products: how the device multiplies.
        """
        keys = keys if 0 < keys < shape.keys else 0
        if keys:
            shape = replace(shape, upcast=True)
        return cls(shape, heads_at_once(shape, heads), max(1, min(rows, shape.queries)), items, keys, products)

    @property
    def _all_heads(self) -> int:
        return self.items * self.heads

    @property
    def _all_key_heads(self) -> int:
        return self.items * max(1, self.heads // self.shape.group)

    @property
    def keys_at_once(self) -> int:
        """The number `m` of keys that are computed at a time: a chunk's, or all."""
        return self.keys or self.shape.keys

    @property
    def converts(self) -> bool:
        """The scores have another dtype than the inputs."""
        return self.shape.score_itemsize != self.shape.itemsize

    @property
    def stages(self) -> bool:
        """Products are written into a tile first, because they cannot be written directly into the output.

        This is so for scores of another dtype, for heads that share a key head, and for several items.
        """
        return self.converts or self.shape.group > 1 or self.items > 1

    @property
    def gathers(self) -> bool:
        """Key and value are copied into a tile first.

        This is so for scores of another dtype, for several items, and for strides that a product cannot read.
        """
        return self.converts or self.shape.irregular or self.items > 1

    @property
    def widens(self) -> bool:
        """In the forward pass, half precision is multiplied as it is, with results in float32.

        This is so in chunks of keys, whose weights are at most 1 and can be rounded as flash attention rounds them.
        """
        in_place = self.shape.group == 1 and self.items == 1 and not self.shape.irregular
        return self.keys > 0 and self.converts and in_place and self.products.widened is not None

    @property
    def splits_keys(self) -> bool:
        """A product that sums over the keys is made of several, because the device sums no more terms."""
        return self.products.most_terms is not None and self.keys_at_once > self.products.most_terms

    @property
    def accumulates(self) -> bool:
        """Gradients of key and value are summed in a tile, and not in the gradients themselves."""
        return self.converts or self.items > 1

    @property
    def scores(self) -> int:
        """`(items * heads, rows, m)`: the scores, which then become the weights."""
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
        """The slice of the mask as numbers to add, or the sum of its gradient; before broadcasting."""
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
        """`(items * heads, rows, 1)`: row maxima, to find the rows for which the mask leaves no key."""
        return self._all_heads * self.rows if self.shape.mask is not None else 0

    @property
    def row_statistics(self) -> int:
        """`(4, items * heads, rows, 1)`: what the running softmax keeps from one chunk of keys to the next."""
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
        if self.widens:  # both in half precision: two elements in the place of one
            sizes |= {"query": ceil_div(self.query, 2), "rounded": ceil_div(self.scores, 2)}
        elif self.gathers:
            sizes |= {"key": self.key, "value": self.value}
        through_tile = not self.products.adds_into_views and (self.keys > 0 or self.splits_keys)
        if self.widens or through_tile:
            sizes["product"] = self.output
        return {name: _in_lines(size) for name, size in sizes.items()}

    @property
    def backward(self) -> dict[str, int]:
        """Elements of each tile of the backward pass, which computes the weights again."""
        # On CUDA the kernel later uses the tile of the output's gradient for one number for each row.
        output = max(self.output, self._all_heads * self.rows)
        forward = replace(self, products=self.products._replace(widened=None)).forward  # it rounds no gradients
        sizes = forward | {"output": _in_lines(output), "grad_scores": _in_lines(self.scores)}
        if not self.products.adds_into_views:
            sizes["product"] = _in_lines(max(self.query, self.output, self.key, self.value))
        if self.stages:
            sizes["grad_query"] = _in_lines(self.query)
        if self.keys:
            sizes["row_product"] = _in_lines(self._all_heads * self.rows)
        if self.accumulates:  # of all keys, because each turn adds to every chunk
            all_keys = self._all_key_heads * self.shape.keys
            sizes |= {
                "grad_key": _in_lines(all_keys * self.shape.head_dim),
                "grad_value": _in_lines(all_keys * self.shape.values),
            }
        return sizes

    def workspace(self, *, training: bool) -> int:
        """Bytes of the single buffer that holds all tiles."""
        passes = (self.forward, self.backward) if training else (self.forward,)
        return max(sum(sizes.values()) for sizes in passes) * self.shape.score_itemsize

    def largest_buffer(self, *, training: bool, checkpoint: bool = True) -> int:
        """Bytes of the largest single allocation: of the workspace, or of the weights that are kept."""
        kept = 0 if checkpoint or not training else self.shape.scores_bytes
        return max(self.workspace(training=training), kept)

    def peak(self, *, training: bool, checkpoint: bool = True) -> int:
        """Peak bytes beyond inputs, output and input gradients.

        Args:
            training: count the backward pass too.
            checkpoint: the backward pass recomputes each slice. Otherwise the weights of all slices are kept for it.
        """
        rest = self.row_maximum + _SCALAR_BYTES  # a bool for each row marks the rows without a key
        if self.shape.dropout:
            rest += _SEED_BYTES
        if training and not checkpoint:
            rest += self.shape.scores_bytes
        if training:
            rest += self.mask_sum
        return self.workspace(training=training) + rest

    @property
    def mask_sum(self) -> int:
        """Bytes of the sum of the mask's gradient, which has the dtype of the scores, if it is not the gradient itself.

        A mask has the dtype of the query or float32, and so has its gradient.
        """
        mask, size = self.shape.mask, self.shape.score_itemsize
        if mask is None or not mask.has_grad:
            return 0
        return 0 if size == (4 if mask.other_dtype else self.shape.itemsize) else mask.elements * size


def _in_lines(elements: int) -> int:
    return round_up(elements, _LINE)
