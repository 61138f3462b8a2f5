"""What the kernels are told, in records: tensors, sizes and factors at run time, `Settings` when they are compiled."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """A `(B, H, N, D)` tensor.

    Attributes:
        data: where it begins.
        item, head, row: strides, in units of `Settings.unit` elements; those of a mask in elements.
        column: stride, in elements.
    """

    data: Tensor
    item: int
    head: int
    row: int
    column: int


class Sizes(NamedTuple):
    """Sizes of a call that may change without compiling anew.

    Attributes:
        heads: heads of the query.
        group: heads of the query that share one of key and value.
        queries: rows of the scores.
        keys: columns of the scores.
    """

    heads: int
    group: int
    queries: int
    keys: int


class Factors(NamedTuple):
    """Numbers that a call multiplies with.

    Attributes:
        scale: of the products of queries and keys.
        exponent: makes exponents of 2 of differences of scores.
        dropout_p: probability of dropping a weight.
        kept: factor of the weights that are not dropped.
    """

    scale: float
    exponent: float
    dropout_p: float
    kept: float


class Settings(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        rows: rows of a tile of scores.
        keys: its columns.
        width: channels of query and key that are multiplied at a time, a power of two.
        chunks: how many times that is, to have all of them.
        value_width: the same of values and the output's gradient.
        value_chunks: the same.
        out_width: columns of a result that one program computes, a power of two.
        head_dim: channels of query and key.
        value_dim: channels of values.
        mask: "none", "bool" or "additive".
        causal: a row sees the keys up to its own number.
        dropout: weights are dropped.
        unit: what all strides of items, heads and rows are multiples of. Of 8, the GPU reads 16 bytes at a time.
        emulated: it is interpreted on the CPU, where bfloat16 is multiplied and rounded in float32.
    """

    rows: int
    keys: int
    width: int
    chunks: int
    value_width: int
    value_chunks: int
    out_width: int
    head_dim: int
    value_dim: int
    mask: str
    causal: bool
    dropout: bool
    unit: int
    emulated: bool


class MaskSums(NamedTuple):
    """What the gradient of a broadcast mask is summed over, besides rows and keys.

    Attributes:
        items: batch items that share an item of the mask.
        heads: heads that share a head of it.
        own_heads: heads that the mask has.
    """

    items: int
    heads: int
    own_heads: int
