"""The temporary memory of PyTorch's CPU operators, as far as it matters for the peak of a UNet.

It was read off PyTorch's allocator on x86 with oneDNN (`tests/planning/test_cpu_temporaries.py` compares). Convolutions
take what `slicemod.on_cpu.plain_convolution` says. Without AVX2, oneDNN unfolds the patches of an image for the
gradients. Scratch memory of a few hundred KiB, as matrix products have it, is left out. So are the copies in which
several threads may sum the gradient of a small weight.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.half_precision import onednn_limit
from slicemod.on_cpu.plain_convolution import (
    convolution_bytes,
    has_vectors_alone,
    is_unfolded,
    patch_bytes,
    sums_of_one_pixel,
)
from slicemod.torch_internals import has_avx2

_aten = torch.ops.aten


def cpu_temporaries(func: Any, args: Sequence[Any], result: Any) -> Sequence[int]:
    """Bytes that an operator holds for a while beyond its results. Several numbers if one follows the other.

    An operator has as many numbers at every size, so that the timelines of two sizes have the same rows.
    """
    if func is _aten.convolution.default:
        return convolution_bytes(args[0].shape, args[1].shape, result.shape, result.dtype)
    if func is _aten.convolution_backward.default:
        grad_output, image, weight = args[:3]
        return _convolution_gradients(grad_output, image, weight, wanted=args[-1])
    if func is _aten.native_layer_norm.default:
        return (0 if args[0].is_contiguous() else args[0].nbytes,)
    return ()


def _convolution_gradients(
    grad_output: Tensor, image: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[int, int, int]:
    """Bytes while the gradient of the image is computed, while that of the weights is, and while one is copied."""
    if is_unfolded(image.dtype):
        wide_grad_output = 2 * grad_output.nbytes if wanted[2] and len(image) > 1 else 0  # summed in float32
        return 0, wide_grad_output, _patches(image, weight, grad_output) if wanted[1] else 0
    if _unfolds_gradients(image):
        turns = min(torch.get_num_threads(), image.shape[0])  # the patches of an image for each thread
        patches = turns * _patches(image[:1], weight, grad_output[:1])
        return patches, patches + 4 * turns * weight.nbytes, image.nbytes
    to_image = grad_output.nbytes + sums_of_one_pixel(weight.shape, image.shape, weight.dtype)
    to_weight = grad_output.nbytes + image.nbytes
    if weight.element_size() < 4:
        to_weight += 4 * weight.numel()  # it is summed in float32
        if weight[0, 0].numel() > 1 and has_vectors_alone(weight.dtype):
            to_weight += image[:1].nbytes + grad_output[:1].nbytes  # each image is transposed
    return to_image, to_weight, weight.nbytes


def _unfolds_gradients(image: Tensor) -> bool:
    """oneDNN's backward pass of this convolution unfolds patches: in float32 on x86-64 processors without AVX2."""
    if image.dtype != torch.float32 or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not has_avx2() or onednn_limit() in ("SSE41", "AVX")


def _patches(image: Tensor, weight: Tensor, result: Tensor) -> int:
    return patch_bytes(image.shape, weight.shape, result.shape, image.dtype)


def no_temporaries(_func: Any, _args: Sequence[Any], _result: Any) -> Sequence[int]:
    """For devices whose operators were not examined."""
    return ()
