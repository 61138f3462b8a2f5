"""What PyTorch's CPU operators allocate within themselves, as far as the peak of a UNet shows it.

Read off the allocator on x86 with oneDNN, whose convolutions copy weights and input into blocks of channels, compute
into such blocks, and copy those into the result. Where oneDNN does not multiply a half precision, PyTorch convolves by
products with the unfolded patches of the whole batch; without AVX2, oneDNN unfolds the patches of an image for the
gradients. Scratch of a few hundred KiB, as matrix products have it, is left out, and so are the copies by which more
threads than one may sum the gradient of a small weight.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.half_precision import cpu_products, onednn_limit
from slicemod.torch_internals import has_avx2

_aten = torch.ops.aten
# PyTorch convolves a single float32 image of no more elements by a product with its unfolded patches
# (use_mkldnn in ATen/native/Convolution.cpp).
_SMALL_IMAGE = 20480


def cpu_temporaries(func: Any, args: Sequence[Any], result: Any) -> Sequence[int]:
    """Bytes beyond its results that an operator holds for a while; several where one follows the other.

    As many for the same operator at every size, so that timelines of two sizes have the same rows.
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
    """Of an image `(B, C, h, w)` with weights `(C', C, kh, kw)`."""
    if _unfolds(image) or (image.dtype == torch.float32 and image.shape[0] == 1 and image.numel() <= _SMALL_IMAGE):
        return 0, _unfolded(image, weight, result)
    return image.nbytes + weight.nbytes + _sums_of_one_pixel(weight, result), result.nbytes


def _convolution_gradients(
    grad_output: Tensor, image: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[int, int, int]:
    """While the gradient of the image is computed, that of the weights, and when one of them is copied."""
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
    """Bytes that a product of channels, pixel by pixel, sums in float32: an image of the result for each thread."""
    if weight[0, 0].numel() > 1 or weight.element_size() == 4 or not _has_vectors_alone(weight):
        return 0
    return 4 * result[:1].numel() * torch.get_num_threads()


def _has_vectors_alone(tensor: Tensor) -> bool:
    """oneDNN multiplies this half precision by vectors of AVX-512, not by tiles, which take less."""
    return cpu_products(tensor.dtype) in ("bfloat16", "widened")


def _unfolds_gradients(image: Tensor) -> bool:
    """oneDNN has no backward pass of its own for float32 on an x86-64 processor without AVX2."""
    if image.dtype != torch.float32 or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not has_avx2() or onednn_limit() in ("SSE41", "AVX")


def _unfolds(image: Tensor) -> bool:
    """Convolutions of this dtype are not oneDNN's on this processor."""
    return image.element_size() == 2 and cpu_products(image.dtype) is None


def _unfolded(image: Tensor, weight: Tensor, result: Tensor) -> int:
    """Bytes of all patches; those of one pixel lie in the image."""
    pixels = weight[0, 0].numel()
    return 0 if pixels == 1 else pixels * image.shape[1] * result[:, 0].numel() * image.element_size()


def no_temporaries(_func: Any, _args: Sequence[Any], _result: Any) -> Sequence[int]:
    """For devices whose operators nobody looked into."""
    return ()
