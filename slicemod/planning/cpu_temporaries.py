"""The temporary memory of PyTorch's CPU operators, as far as it matters for the peak of a UNet.

It was read off PyTorch's allocator on x86 with oneDNN (`tests/planning/test_cpu_temporaries.py` compares). oneDNN's
convolutions copy weights and input into blocks of channels, compute into such blocks, and copy these into the result.
If oneDNN does not multiply a half precision, PyTorch convolves by products with the unfolded patches of the whole
batch. Without AVX2, oneDNN unfolds the patches of an image for the gradients. Scratch memory of a few hundred KiB, as
matrix products have it, is left out. So are the copies in which several threads may sum the gradient of a small weight.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.half_precision import cpu_products, onednn_limit
from slicemod.torch_internals import has_avx2
from slicemod.vae.plan import SMALL_IMAGE

_aten = torch.ops.aten


def cpu_temporaries(func: Any, args: Sequence[Any], result: Any) -> Sequence[int]:
    """Bytes that an operator holds for a while beyond its results. Several numbers if one follows the other.

    An operator has as many numbers at every size, so that the timelines of two sizes have the same rows.
    """
    if func is _aten.convolution.default:
        return _convolution(args[0], args[1], result)
    if func is _aten.convolution_backward.default:
        grad_output, image, weight = args[:3]
        return _convolution_gradients(grad_output, image, weight, wanted=args[-1])
    if func is _aten.native_layer_norm.default:
        return (0 if args[0].is_contiguous() else args[0].nbytes,)
    return ()


def _convolution(image: Tensor, weight: Tensor, result: Tensor) -> Sequence[int]:
    """For a convolution of an image `(B, C, h, w)` with weights `(C', C, kh, kw)`."""
    is_small = image.shape[0] == 1 and math.prod(image.shape[:4]) <= SMALL_IMAGE
    if _unfolds(image) or (image.dtype == torch.float32 and is_small):
        return 0, _unfolded(image, weight, result)
    return image.nbytes + weight.nbytes + _sums_of_one_pixel(weight, result), result.nbytes


def _convolution_gradients(
    grad_output: Tensor, image: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[int, int, int]:
    """Bytes while the gradient of the image is computed, while that of the weights is, and while one is copied."""
    if _unfolds(image):
        wide_grad_output = 2 * grad_output.nbytes if wanted[2] and len(image) > 1 else 0  # summed in float32
        return 0, wide_grad_output, _unfolded(image, weight, grad_output) if wanted[1] else 0
    if _unfolds_gradients(image):
        turns = min(torch.get_num_threads(), image.shape[0])  # the patches of an image for each thread
        patches = turns * _unfolded(image[:1], weight, grad_output[:1])
        return patches, patches + 4 * turns * weight.nbytes, image.nbytes
    to_image = grad_output.nbytes + _sums_of_one_pixel(weight, image)
    to_weight = grad_output.nbytes + image.nbytes
    if weight.element_size() < 4:
        to_weight += 4 * weight.numel()  # it is summed in float32
        if weight[0, 0].numel() > 1 and _has_vectors_alone(weight):
            to_weight += image[:1].nbytes + grad_output[:1].nbytes  # each image is transposed
    return to_image, to_weight, weight.nbytes


def _sums_of_one_pixel(weight: Tensor, result: Tensor) -> int:
    """Bytes in which a convolution of single pixels sums in float32: one image of the result for each thread."""
    if weight[0, 0].numel() > 1 or weight.element_size() == 4 or not _has_vectors_alone(weight):
        return 0
    return 4 * result[:1].numel() * torch.get_num_threads()


def _has_vectors_alone(tensor: Tensor) -> bool:
    """oneDNN multiplies this half precision by vectors of AVX-512, not by the tiles of AMX, which need less memory."""
    return cpu_products(tensor.dtype) in ("bfloat16", "widened")


def _unfolds_gradients(image: Tensor) -> bool:
    """oneDNN's backward pass of this convolution unfolds patches: in float32 on x86-64 processors without AVX2."""
    if image.dtype != torch.float32 or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not has_avx2() or onednn_limit() in ("SSE41", "AVX")


def _unfolds(image: Tensor) -> bool:
    """oneDNN does not compute convolutions of this dtype on this processor, so PyTorch unfolds patches."""
    return image.element_size() == 2 and cpu_products(image.dtype) is None


def _unfolded(image: Tensor, weight: Tensor, result: Tensor) -> int:
    """Bytes of all patches. Patches of one pixel need no copy."""
    pixels = weight[0, 0].numel()
    return 0 if pixels == 1 else pixels * image.shape[1] * result[:, 0].numel() * image.element_size()


def no_temporaries(_func: Any, _args: Sequence[Any], _result: Any) -> Sequence[int]:
    """For devices whose operators were not examined."""
    return ()
