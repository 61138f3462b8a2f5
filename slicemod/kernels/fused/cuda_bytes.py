"""The bytes that PyTorch's fused CUDA kernels allocate: the most that any of the three takes.

Which of flash, memory-efficient and cuDNN attention runs depends on the GPU, and on PyTorch's version and settings. A
plan has to hold for all of them. The numbers are from these sources of PyTorch, in ATen/native/transformers/cuda:
flash_attn/flash_api.cpp, attention_backward.cu and mem_eff_attention/kernel_backward.h. They were compared with what
PyTorch's allocator was asked for on an H200 (`tests/kernels/fused/test_cuda_bytes.py` has the measurements).
"""

from slicemod.call import AttentionShape
from slicemod.rounding import ceil_div, round_up

_MOST_SPLITS = 128
_SCALARS = 2048  # bytes of seeds, offsets and single numbers; each has an allocation of its own
_FLOAT = 4  # bytes of a float32, in which the kernels sum


def cuda_fused_peak(shape: AttentionShape, *, training: bool, processors: int) -> int:
    """Peak bytes beyond inputs, output and input gradients.

    Half precision may run any of the kernels, float32 only the memory-efficient one. In training the forward pass
    counts too, because it can take more than the backward pass if it splits the keys.
    """
    peaks = [_efficient_forward(shape)]
    if training:
        peaks.append(_efficient_backward(shape))
    if shape.itemsize < _FLOAT and shape.head_dim <= 256:
        peaks.append(_flash_forward(shape, processors))
        if training:
            peaks.append(_flash_backward(shape))
    logsumexp = shape.batch_heads * round_up(shape.queries, 32) * _FLOAT
    # A bool mask is converted, and a mask is copied if its rows are not aligned.
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
    """Row sums and the query's gradient in float32, in whole blocks of rows.

    If query heads share key heads, the gradients of key and value for each query head come on top.
    """
    rows = shape.batch_heads * round_up(shape.queries, 128)
    queries, keys = _padded(shape)
    shared = 0 if shape.group == 1 else 2 * shape.batch_heads * shape.keys * shape.head_dim * shape.itemsize
    return rows * (1 + _flash_width(shape)) * _FLOAT + shared + 4 * queries + 4 * keys


def flash_splits(shape: AttentionShape, processors: int) -> int:
    """In how many parts flash attention splits the keys, if there are too few rows to fill the GPU.

    This is `num_splits_heuristic` of flash_api.cpp: the fewest parts that use the processors at least 85% as well as
    the best number of parts does, with two blocks for each processor.

    >>> flash_splits(AttentionShape(2, 8, 256, 256, 160, 2), 132)
    4
    """
    block = 256 if shape.head_dim <= 64 else 128 if shape.head_dim <= 128 else 64
    key_blocks, blocks = ceil_div(shape.keys, block), shape.batch_heads * ceil_div(shape.queries, 64)
    if shape.queries == 1:  # the kernel then treats the heads that share a key head as rows
        blocks = shape.batch_heads // shape.group * ceil_div(shape.group, 64)
    slots = 2 * processors
    if not blocks or not key_blocks or blocks >= 0.8 * slots:
        return 1

    def use(splits: int) -> float:
        waves = blocks * splits / slots
        return waves / ceil_div(blocks * splits, slots)

    most = min(_MOST_SPLITS, slots, key_blocks)
    # Skip a number of parts if one part less gives parts of the same size: the last part would be empty.
    counts = [n for n in range(1, most + 1) if n == 1 or ceil_div(key_blocks, n) != ceil_div(key_blocks, n - 1)]
    best = max(map(use, counts))
    return next(n for n in counts if use(n) >= 0.85 * best)


def _efficient_forward(shape: AttentionShape) -> int:
    """Outputs of wide heads in half precision do not stay in registers, and are summed in float32."""
    return shape.batch_heads * shape.queries * shape.values * _FLOAT if _is_wide_half(shape) else 0


def _efficient_backward(shape: AttentionShape) -> int:
    """Row sums, and the query's gradient in float32, in whole blocks of rows.

    For wide heads in half precision the gradients of key and value are summed in float32 as well.

    With inputs in float32, the row sums are made from a product as large as the output, and are copied once.
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
    """Bytes of the queries, and of the keys, padded to a width that is a multiple of 8. 0 if they need no padding."""
    width = round_up(shape.head_dim, 8)
    if width == shape.head_dim:
        return 0, 0
    of_a_row = width * shape.itemsize
    return shape.batch_heads * shape.queries * of_a_row, shape.batch_heads // shape.group * shape.keys * of_a_row
