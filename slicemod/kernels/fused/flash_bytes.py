"""The bytes that PyTorch's flash attention allocates on CUDA.

They are from `mha_fwd` and `mha_bwd` of ATen/native/transformers/cuda/flash_attn/flash_api.cpp, from
`_flash_attention_backward` of attention_backward.cu, and from `pad_last_dim` of attention.cpp.
"""

from __future__ import annotations

from slicemod.call import AttentionShape
from slicemod.card import Card
from slicemod.rounding import ceil_div, round_up

_MOST_SPLITS = 128
_FLOAT = 4  # bytes of a float32, in which the kernel sums
_ROWS = 128  # queries of a block in the backward pass


def flash_forward(shape: AttentionShape, card: Card) -> int:
    """Bytes of the forward pass: outputs of parts of the keys, and padded copies of query, key, value and output."""
    splits = flash_splits(shape, card.processors)
    accumulated = 0
    if splits > 1:
        accumulated = splits * shape.batch_heads * shape.queries * (_width(shape) + 1) * _FLOAT
    queries, keys = _padded(shape)
    return accumulated + 2 * queries + 2 * keys


def flash_backward(shape: AttentionShape, card: Card, *, merged: bool, deterministic: bool) -> int:
    """Bytes of the backward pass: row sums and the query's gradient in float32, in whole blocks of rows.

    Args:
        shape: sizes of the call.
        card: where it runs.
        merged: query and output lie as `(B, N, H, D)`; otherwise output and its gradient are copied.
        deterministic: each processor sums its own gradient of the query.
    """
    rows = shape.batch_heads * round_up(shape.queries, _ROWS)
    sums = ceil_div(card.processors, max(1, shape.batch_heads)) if deterministic else 1
    queries, keys = _padded(shape)
    output = queries or shape.batch_heads * shape.queries * shape.head_dim * shape.itemsize
    copied = 0 if merged and not queries else 2 * output  # padded tensors lie as (B, H, N, D)
    # If query heads share key heads, the gradients of key and value for each query head are summed afterwards.
    width = round_up(shape.head_dim, 8)
    shared = 0 if shape.group == 1 else 2 * shape.batch_heads * shape.keys * width * shape.itemsize
    return rows * (1 + sums * _width(shape)) * _FLOAT + shared + copied + 4 * queries + 4 * keys


def flash_splits(shape: AttentionShape, processors: int) -> int:
    """In how many parts flash attention splits the keys, if there are too few rows to fill the GPU.

    This is `num_splits_heuristic` of flash_api.cpp: the fewest parts that use the processors at least 85% as well as
    the best number of parts does, with two blocks for each processor. With dropout the keys are not split.

    >>> flash_splits(AttentionShape(2, 8, 256, 256, 160, 2), 132)
    4
    """
    block = 256 if shape.head_dim <= 64 else 128 if shape.head_dim <= 128 else 64
    key_blocks, blocks = ceil_div(shape.keys, block), shape.batch_heads * ceil_div(shape.queries, 64)
    if shape.queries == 1:  # the kernel then treats the heads that share a key head as rows
        blocks = shape.batch_heads // shape.group * ceil_div(shape.group, 64)
    slots = 2 * processors
    if shape.dropout or not blocks or not key_blocks or blocks >= 0.8 * slots:
        return 1

    def use(splits: int) -> float:
        waves = blocks * splits / slots
        return waves / ceil_div(blocks * splits, slots)

    most = min(_MOST_SPLITS, slots, key_blocks)
    # Skip a number of parts if one part less gives parts of the same size: the last part would be empty.
    counts = [n for n in range(1, most + 1) if n == 1 or ceil_div(key_blocks, n) != ceil_div(key_blocks, n - 1)]
    best = max(map(use, counts))
    return next(n for n in counts if use(n) >= 0.85 * best)


def _width(shape: AttentionShape) -> int:
    width = round_up(shape.head_dim, 8)
    return round_up(width, 32 if width <= 128 else 64)


def _padded(shape: AttentionShape) -> tuple[int, int]:
    """Bytes of the queries, and of the keys, padded to a width that is a multiple of 8. 0 if they need no padding."""
    width = round_up(shape.head_dim, 8)
    if width == shape.head_dim:
        return 0, 0
    of_a_row = width * shape.itemsize
    return shape.batch_heads * shape.queries * of_a_row, shape.batch_heads // shape.group * shape.keys * of_a_row
