"""Sizes of one attention call, and what each way to compute it allocates: plain ints, no tensors.

`Tiles` is the workspace of the sliced kernel. The planner adds its tiles up and the kernel allocates the same tiles:
one list serves both, so that a plan cannot promise other bytes than the loop takes.
"""

import math
from dataclasses import dataclass, replace

from slicemod.onednn_scratch import Products, flash_scratch_bytes, packed_bytes

# The block sizes of PyTorch's CPU flash kernel (ATen/native/cpu/FlashAttentionKernel.cpp): rows of queries by the
# query count, and columns of keys.
_FLASH_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
_FLASH_KEY_BLOCK = 512

# Scores of batch items that are computed together; an item with more is a turn of its own. A turn costs some 100
# microseconds of dispatch, which this many scores take as well.
_SMALL_SCORES = 2**18

# CUDA launches batched matrix products on a grid whose third dimension has 16 bits.
_MOST_PRODUCTS = 65_535

# PyTorch makes a tensor of a Python number, such as the scale, once in float64 and once in the other operand's dtype.
_SCALAR_BYTES = 16
_SEED_BYTES = 8


@dataclass(frozen=True)
class MaskShape:
    """Sizes of an attention mask as it was given, before broadcasting, each 1 or the size of the scores.

    A mask that `is_bool` or has `other_dtype` than the query is laid out anew, a slice at a time by the sliced kernel
    and whole by a fused one. A mask that `has_grad` gets a gradient, summed over
    the dimensions it is broadcast along.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    is_bool: bool = False
    has_grad: bool = False
    other_dtype: bool = False

    @property
    def elements(self) -> int:
        """Elements of the whole mask."""
        return self.batch * self.heads * self.queries * self.keys


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call.

    Args:
        batch: batch items `B`.
        heads: query heads `H`.
        queries: query tokens `N`.
        keys: key tokens `M`.
        head_dim: size `D` of one head's queries and keys.
        itemsize: bytes per element of query, key and value.
        value_dim: size `Dv` of one head's values; `head_dim` when left out.
        key_heads: heads of key and value, a divisor of `heads` (grouped-query attention); `heads` when left out.
        upcast: scores are computed in float32 where `itemsize` is less.
        causal: a query sees the keys up to its own position.
        dropout: attention weights are dropped, so that a slice keeps its draw.
        irregular: key or value have strides that no matrix product reads, so that they are gathered first.
        mask: sizes of the attention mask, if there is one.

    Raises:
        ValueError: a size is negative, or `heads` is no multiple of `key_heads`.

    >>> AttentionShape(1, 8, 4096, 4096, 40, 2).scores_bytes
    268435456
    """

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    itemsize: int
    value_dim: int | None = None
    key_heads: int | None = None
    upcast: bool = False
    causal: bool = False
    dropout: bool = False
    irregular: bool = False
    mask: MaskShape | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "queries", "keys", "head_dim"):
            size = getattr(self, name)
            if size < 0:
                raise ValueError(f"AttentionShape: {name} must be 0 or more, got {size}. Pass the tensor's size.")
        if self.itemsize not in (2, 4, 8):
            raise ValueError(
                f"AttentionShape: itemsize must be 2, 4 or 8 bytes (half, single, double), got {self.itemsize}. "
                "Pass tensor.element_size() of a floating-point tensor."
            )
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise ValueError(
                f"AttentionShape: heads must be a multiple of key_heads, got heads={self.heads} and "
                f"key_heads={self.key_heads}. Repeat the key heads so that they divide the query heads."
            )

    @property
    def score_itemsize(self) -> int:
        """Bytes per element of the scores."""
        return max(self.itemsize, 4) if self.upcast else self.itemsize

    @property
    def values(self) -> int:
        """Size `Dv` of one head's values."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return 1 if self.key_heads is None else self.heads // self.key_heads

    @property
    def batch_heads(self) -> int:
        """`B * H`."""
        return self.batch * self.heads

    @property
    def scores_bytes(self) -> int:
        """Bytes of the full score matrix, `B*H * N * M * e`."""
        return self.batch_heads * self.queries * self.keys * self.score_itemsize

    def at_side(self, side: int) -> "AttentionShape":
        """The same attention in a square image of `side` pixels, with a query for each 8 by 8 of them.

        Self-attention has as many keys; the keys of a context stay as they are.
        """
        queries = (side // 8) ** 2
        keys = queries if self.keys == self.queries else self.keys
        mask = self.mask
        if mask is not None:
            mask = replace(mask, queries=queries if mask.queries > 1 else 1, keys=keys if mask.keys > 1 else 1)
        return replace(self, queries=queries, keys=keys, mask=mask)

    def heads_at_once(self, heads: int) -> int:
        """Most heads that one turn of the loop covers when a slice has `heads` of the `B*H`.

        Heads of one batch item, since those of two share no stride in a layer's layout. A turn takes whole groups of
        heads that share a key head, or stays within one group.
        """
        most = max(1, min(heads, self.heads, _MOST_PRODUCTS))
        return most if most <= self.group else most - most % self.group

    def items_at_once(self, heads: int, rows: int) -> int:
        """Batch items that one turn of the loop had better cover, memory allowing.

        One, but for small ones that lie in a slice whole: their keys and values are gathered then, which costs less
        than a turn for each.
        """
        if heads < 2 * max(1, self.heads) or rows < self.queries or self.heads_at_once(heads) < self.heads:
            return 1
        together = max(1, _SMALL_SCORES // max(1, self.heads * self.queries * self.keys))
        return min(heads // self.heads, self.batch, together)

    def flash_peak(self, threads: int, *, training: bool, products: Products | None = None) -> int:
        """Peak bytes of PyTorch's CPU flash kernel beyond inputs, output and input gradients, on `threads` threads.

        A block of scores, its row statistics and its output for each thread, in float32 and, for half precision,
        once more as the block enters the second product; the log-sum-exp of every row; the additive copy of a bool
        mask. After ATen/native/cpu/FlashAttentionKernel.cpp. `products`: how the CPU multiplies this half
        precision, which takes a scratchpad.
        """
        rows = min(next(block for least, block in _FLASH_QUERY_BLOCKS if self.queries >= least), self.queries)
        keys = min(_FLASH_KEY_BLOCK, self.keys)
        accumulate = max(self.itemsize, 4)
        reduced = self.itemsize if self.itemsize < 4 else 0
        forward = threads * ((rows * keys + 2 * rows + rows * self.head_dim) * accumulate + rows * keys * reduced)
        backward = threads * 2 * rows * keys * (accumulate + reduced) + rows * accumulate
        if products is not None and reduced:
            backward += flash_scratch_bytes(rows, keys, self.head_dim, threads, products)
        if products == "tiles" and reduced:
            heads = self.batch_heads // self.group
            forward += packed_bytes(heads, self.queries, self.keys, self.head_dim, threads, rows)
        logsumexp = self.batch_heads * self.queries * accumulate
        mask = self.mask.elements * self.itemsize if self.mask is not None and self.mask.is_bool else 0
        return logsumexp + mask + (max(forward, backward) if training else forward)


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
    def of_slice(cls, shape: AttentionShape, heads: int, rows: int, items: int = 1, keys: int = 0) -> "Tiles":
        """The tiles of a slice of `heads` of the `B*H` by `rows` rows that computes `items` batch items together.

        Of `keys` keys at a time if that is not 0; sums over the chunks of half precision are kept in float32.
        """
        keys = keys if 0 < keys < shape.keys else 0
        if keys:
            shape = replace(shape, upcast=True)
        return cls(shape, shape.heads_at_once(heads), max(1, min(rows, shape.queries)), items, keys)

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
        return {name: _aligned(size) for name, size in sizes.items()}

    @property
    def backward(self) -> dict[str, int]:
        """Elements of each tile of the backward pass, which computes the weights once more."""
        # The kernel takes the tile of the output's gradient for a number for each row in the end, on some devices.
        output = max(self.output, self._all_heads * self.rows)
        sizes = self.forward | {"output": _aligned(output), "grad_scores": _aligned(self.scores)}
        if self.stages:
            sizes["grad_query"] = _aligned(self.query)
        if self.keys:
            sizes["row_product"] = _aligned(self._all_heads * self.rows)
        if self.accumulates:  # over all keys, as each turn adds to every chunk
            all_keys = self._all_key_heads * self.shape.keys
            sizes |= {
                "grad_key": _aligned(all_keys * self.shape.head_dim),
                "grad_value": _aligned(all_keys * self.shape.values),
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


def _aligned(elements: int) -> int:
    """Tiles start at whole cache lines, of 16 floats."""
    return -(-elements // 16) * 16


def ceil_div(size: int, parts: int) -> int:
    """`size / parts` rounded up, in ints.

    >>> ceil_div(7, 2)
    4
    """
    return -(-size // parts)


def square_resolution(available: float, per_token_pair: float) -> int:
    """Side in pixels of the largest square image whose `N * N` scores fit, in steps of 64 pixels.

    `available / per_token_pair` token pairs, `N` of which are `(side / 8) ** 2` latent pixels. The webui's formula,
    `floor(sqrt(sqrt(available / 2.5)) / 8) * 64`, is this with 2.5 bytes a pair.
    """
    return math.floor(math.sqrt(math.sqrt(max(0.0, available) / per_token_pair)) / 8) * 64
