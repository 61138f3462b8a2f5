"""What PyTorch's CPU operators allocate within themselves, as far as the peak of a UNet shows it.

Read off the allocator on x86 with oneDNN, whose convolutions copy weights and input into blocks of channels, compute
into such blocks, and copy those into the result. Where oneDNN does not multiply a half precision, PyTorch convolves by
products with the unfolded patches of the whole batch. Scratch of a few hundred KiB, as matrix products have it, is left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.cpu_kernels import cpu_kernels

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
        if _unfolds(image):
            return 0, _unfolded_gradients(image, weight, grad_output) if args[-1][1] else 0
        wide_weight_gradient = weight.numel() * 4 if weight.element_size() < 4 else 0  # it is summed in float32
        return grad_output.nbytes + image.nbytes + wide_weight_gradient, weight.nbytes
    if func is _aten.native_layer_norm.default:
        return (0 if args[0].is_contiguous() else args[0].nbytes,)
    return ()


def _convolution(image: Tensor, weight: Tensor, result: Tensor) -> Sequence[int]:
    """Of an image `(B, C, h, w)` with weights `(C', C, kh, kw)`."""
    if _unfolds(image) or (image.dtype == torch.float32 and image.shape[0] == 1 and image.numel() <= _SMALL_IMAGE):
        return 0, _unfolded(image, weight, result)
    return image.nbytes + weight.nbytes, result.nbytes


def _unfolds(image: Tensor) -> bool:
    """Convolutions of this dtype are not oneDNN's on this processor."""
    return image.element_size() == 2 and cpu_kernels(image.dtype, torch.device("cpu")).products is None


def _unfolded(image: Tensor, weight: Tensor, result: Tensor) -> int:
    """Bytes of all patches; those of one pixel lie in the image."""
    pixels = weight[0, 0].numel()
    return 0 if pixels == 1 else pixels * image.shape[1] * result[:, 0].numel() * image.element_size()


def _unfolded_gradients(image: Tensor, weight: Tensor, grad_output: Tensor) -> int:
    """Bytes that the gradient of the weight takes, which has the items of patches of one pixel one after the other."""
    if weight[0, 0].numel() == 1:
        return 0 if image.shape[0] == 1 else image.nbytes
    return _unfolded(image, weight, grad_output)


def no_temporaries(_func: Any, _args: Sequence[Any], _result: Any) -> Sequence[int]:
    """For devices whose operators nobody looked into."""
    return ()
