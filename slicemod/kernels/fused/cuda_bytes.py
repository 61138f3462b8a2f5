"""What PyTorch's fused CUDA kernels allocate: the most that any of the three takes.

Which of flash, memory-efficient and cuDNN attention runs depends on the GPU, on PyTorch's version and its settings, and
a plan has to hold for all of them. After ATen/native/transformers/cuda: flash_attn/flash_api.cpp,
attention_backward.cu and mem_eff_attention/kernel_backward.h; checked against the allocator on an H200.
"""

from slicemod.call import AttentionShape
from slicemod.rounding import ceil_div, round_up

_MOST_SPLITS = 128
_SCALARS = 2048  # seeds, offsets and numbers, in blocks of their own
_FLOAT = 4  # bytes of what kernels sum in


def cuda_fused_peak(shape: AttentionShape, *, training: bool, processors: int) -> int:
    """Peak bytes beyond inputs, output and input gradients.

    Half precision may take any of the kernels, float32 the memory-efficient one alone. In training the forward pass
    counts as well, since splitting keys can take more than the backward pass does.
    """
    peaks = [_efficient_forward(shape)]
    if training:
        peaks.append(_efficient_backward(shape))
    if shape.itemsize < _FLOAT and shape.head_dim <= 256:
        peaks.append(_flash_forward(shape, processors))
        if training:
            peaks.append(_flash_backward(shape))
    logsumexp = shape.batch_heads * round_up(shape.queries, 32) * _FLOAT
    # A mask is converted from bool, and laid out anew where its rows are not aligned.
    mask = 2 * shape.mask.elements * shape.itemsize if shape.mask is not None else 0
    return logsumexp + mask + max(peaks) + _SCALARS


def _flash_forward(shape: AttentionShape, processors: int) -> int:
    splits = flash_splits(shape, processors)
    accumulated = 0
    if splits > 1:
        accumulated = splits * shape.batch_heads * shape.queries * (_flash_width(shape) + 1) * _FLOAT
    queries, keys = _padded(shape)
    return accumulated + 2 * queries + 2 * keys


def _flash_backward(shape: AttentionShape) -> int:
    """Sums of rows and the query's gradient in float32, in whole blocks of rows, and what shared heads sum up."""
    rows = shape.batch_heads * round_up(shape.queries, 128)
    queries, keys = _padded(shape)
    shared = 0 if shape.group == 1 else 2 * shape.batch_heads * shape.keys * shape.head_dim * shape.itemsize
    return rows * (1 + _flash_width(shape)) * _FLOAT + shared + 4 * queries + 4 * keys


def flash_splits(shape: AttentionShape, processors: int) -> int:
    """Parts of the keys that flash attention computes apart where there are too few rows to fill the GPU.

    The fewest parts that come within 85% of the best use of the processors, two blocks for each, by
    `num_splits_heuristic` of flash_api.cpp.

    >>> flash_splits(AttentionShape(2, 8, 256, 256, 160, 2), 132)
    4
    """
    block = 256 if shape.head_dim <= 64 else 128 if shape.head_dim <= 128 else 64
    key_blocks, blocks = ceil_div(shape.keys, block), shape.batch_heads * ceil_div(shape.queries, 64)
    if shape.queries == 1:  # heads that share a key head are taken for rows
        blocks = shape.batch_heads // shape.group * ceil_div(shape.group, 64)
    slots = 2 * processors
    if not blocks or not key_blocks or blocks >= 0.8 * slots:
        return 1

    def use(splits: int) -> float:
        waves = blocks * splits / slots
        return waves / ceil_div(blocks * splits, slots)

    most = min(_MOST_SPLITS, slots, key_blocks)
    # Some numbers of parts leave the last ones empty, and are those of fewer.
    counts = [n for n in range(1, most + 1) if n == 1 or ceil_div(key_blocks, n) != ceil_div(key_blocks, n - 1)]
    best = max(map(use, counts))
    return next(n for n in counts if use(n) >= 0.85 * best)


def _efficient_forward(shape: AttentionShape) -> int:
    """Wide heads of half precision do not stay in registers, and are summed in float32."""
    return shape.batch_heads * shape.queries * shape.values * _FLOAT if _is_wide_half(shape) else 0


def _efficient_backward(shape: AttentionShape) -> int:
    """Sums of rows, the query's gradient in float32 in blocks of rows, and wide heads' of key and value as well.

    In float32 the sums come from a product as large as the output, and are laid out anew.
    """
    width = round_up(shape.head_dim, 64)
    sums = shape.batch_heads * round_up(shape.queries, 32) * _FLOAT
    counters = ceil_div(shape.queries, 64) * (width // 64) * 16
    blocks = shape.batch_heads * (round_up(shape.queries, 64 if width <= 128 else 128) * width * _FLOAT + counters)
    if _is_wide_half(shape):
        blocks += 2 * shape.batch_heads * (round_up(shape.keys, 128) + 128) * width * _FLOAT
    if shape.itemsize < _FLOAT:
        return sums + blocks
    product = shape.batch_heads * shape.queries * shape.values * _FLOAT
    return sums + max(blocks, product + sums)


def _is_wide_half(shape: AttentionShape) -> bool:
    return shape.itemsize < _FLOAT and shape.head_dim > 128


def _flash_width(shape: AttentionShape) -> int:
    width = round_up(shape.head_dim, 8)
    return round_up(width, 32 if width <= 128 else 64)


def _padded(shape: AttentionShape) -> tuple[int, int]:
    """Bytes of queries, and of keys, filled up to a width that is a multiple of 8; 0 where they are so already."""
    width = round_up(shape.head_dim, 8)
    if width == shape.head_dim:
        return 0, 0
    of_a_row = width * shape.itemsize
    return shape.batch_heads * shape.queries * of_a_row, shape.batch_heads // shape.group * shape.keys * of_a_row
