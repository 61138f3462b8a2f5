"""The memory of PyTorch's own convolutions on a CPU beyond their result, from sizes alone.

It was read off PyTorch's allocator on x86 with oneDNN (`tests/planning/test_cpu_temporaries.py` compares). oneDNN's
convolutions copy weights and input into blocks of channels, compute into such blocks, and copy these into the result.
If oneDNN does not multiply a half precision, PyTorch convolves by products with the unfolded patches of the whole
batch.

Images are `(B, C, ...)`, in which pixels may be one number; weights are `(C', C, kh, kw)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from slicemod.half_precision import cpu_products
from slicemod.rounding import round_up
from slicemod.torch_internals import has_avx512

# PyTorch convolves a single float32 image by a product with its unfolded patches if its first four dimensions, all but
# the last one of a video, have at most this many elements (use_mkldnn in ATen/native/Convolution.cpp).
SMALL_IMAGE = 20480
_ALIGNMENT = 128  # bytes at most, of what oneDNN takes for itself


def convolution_bytes(
    image: Sequence[int], weight: Sequence[int], result: Sequence[int], dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that a convolution holds beyond its result: until that is computed in blocks, and while it is copied."""
    is_small = image[0] == 1 and math.prod(image[:4]) <= SMALL_IMAGE
    if is_unfolded(dtype) or (dtype == torch.float32 and is_small):
        return 0, patch_bytes(image, weight, result, dtype)
    outputs, channels = map(_whole_blocks, weight[:2])
    copies = image[0] * _whole_blocks(image[1]) * math.prod(image[2:]) + outputs * channels * math.prod(weight[2:])
    computed = result[0] * outputs * math.prod(result[2:])
    beside = (copies + computed - math.prod(result)) * dtype.itemsize
    if outputs > weight[0]:
        beside += 4 * outputs + _ALIGNMENT  # the bias is copied too
    return beside + sums_of_one_pixel(weight, result, dtype), computed * dtype.itemsize


def _whole_blocks(channels: int) -> int:
    """Channels in whole blocks, which are as wide as the vectors."""
    return round_up(channels, 16 if has_avx512() else 8)


def is_unfolded(dtype: torch.dtype) -> bool:
    """oneDNN does not compute convolutions of this dtype on this processor, so PyTorch unfolds patches."""
    return dtype.itemsize == 2 and cpu_products(dtype) is None


def patch_bytes(image: Sequence[int], weight: Sequence[int], result: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of all patches. Patches of one pixel need no copy."""
    pixels = math.prod(weight[2:])
    return 0 if pixels == 1 else pixels * image[1] * result[0] * math.prod(result[2:]) * dtype.itemsize


def sums_of_one_pixel(weight: Sequence[int], result: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes in which a convolution of single pixels sums in float32: one image of the result for each thread."""
    if math.prod(weight[2:]) > 1 or dtype.itemsize == 4 or not has_vectors_alone(dtype):
        return 0
    return 4 * math.prod(result[1:]) * torch.get_num_threads()


def has_vectors_alone(dtype: torch.dtype) -> bool:
    """oneDNN multiplies this half precision by vectors of AVX-512, not by the tiles of AMX, which need less memory."""
    return cpu_products(dtype) in ("bfloat16", "widened")
