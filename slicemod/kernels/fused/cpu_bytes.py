"""The bytes that PyTorch's fused attention allocates on a CPU, in its flash kernel and in oneDNN inside of it."""

from __future__ import annotations

from slicemod.call import AttentionShape
from slicemod.half_precision import Products
from slicemod.kernels.fused.onednn_scratch import flash_scratch_bytes, packed_bytes

# The block sizes of PyTorch's CPU flash kernel, from ATen/native/cpu/FlashAttentionKernel.cpp of PyTorch. For a call
# with at least the first number of queries, a block has the second number of queries.
_FLASH_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
_FLASH_KEY_BLOCK = 512


def cpu_flash_peak(shape: AttentionShape, threads: int, *, training: bool, products: Products | None = None) -> int:
    """Peak bytes of PyTorch's CPU flash kernel beyond inputs, output and input gradients, on `threads` threads.

    These are, according to ATen/native/cpu/FlashAttentionKernel.cpp: for each thread, a block of scores, its row
    statistics and its output, in float32; for half precision the block of weights once more, rounded for the second
    product; the log-sum-exp of every row; and the additive copy of a bool mask.

    Args:
        shape: sizes of the call.
        threads: PyTorch's threads.
        training: count the backward pass too.
        products: how oneDNN multiplies the dtype (`cpu_products`); it needs a scratchpad for that.
    """
    rows = min(next(block for least, block in _FLASH_QUERY_BLOCKS if shape.queries >= least), shape.queries)
    keys = min(_FLASH_KEY_BLOCK, shape.keys)
    accumulate = max(shape.itemsize, 4)
    reduced = shape.itemsize if shape.itemsize < 4 else 0
    forward = threads * ((rows * keys + 2 * rows + rows * shape.head_dim) * accumulate + rows * keys * reduced)
    backward = threads * 2 * rows * keys * (accumulate + reduced) + rows * accumulate
    if products is not None and reduced:
        backward += flash_scratch_bytes(rows, keys, shape.head_dim, threads, products)
    if products == "tiles" and reduced:
        heads = shape.batch_heads // shape.group
        forward += packed_bytes(heads, shape.queries, shape.keys, shape.head_dim, threads, rows)
    logsumexp = shape.batch_heads * shape.queries * accumulate
    mask = shape.mask.elements * shape.itemsize if shape.mask is not None and shape.mask.is_bool else 0
    return logsumexp + mask + (max(forward, backward) if training else forward)
