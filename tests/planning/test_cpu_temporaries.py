"""The temporary memory of CPU operators is what the allocator is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod.bench.memory import peak_memory
from slicemod.half_precision import cpu_products
from slicemod.planning.cpu_temporaries import cpu_temporaries, no_temporaries

_aten = torch.ops.aten


def _convolution(image: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    padding = weight[2] // 2
    tensors = torch.randn(image).to(dtype), torch.randn(weight).to(dtype), torch.randn(weight[0]).to(dtype)
    return (*tensors, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1)


def _gradients(image: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    x, w, bias, *settings = _convolution(image, weight, dtype)
    grad_output = torch.randn(image[0], weight[0], *image[2:]).to(dtype)
    return (grad_output, x, w, [len(bias)], *settings, [True, True, True])


CASES = {
    "wide convolution": (_aten.convolution.default, _convolution((1, 640, 32, 32), (320, 640, 3, 3), torch.float32)),
    "large image": (_aten.convolution.default, _convolution((2, 64, 64, 64), (64, 64, 3, 3), torch.float32)),
    "bfloat16": (_aten.convolution.default, _convolution((1, 640, 16, 16), (320, 640, 3, 3), torch.bfloat16)),
    "small image": (_aten.convolution.default, _convolution((1, 256, 8, 8), (128, 256, 3, 3), torch.float32)),
    "unfolded patches of one pixel": (
        _aten.convolution.default,
        _convolution((2, 320, 16, 16), (64, 320, 1, 1), torch.bfloat16),
    ),
    "unfolded patches backward": (
        _aten.convolution_backward.default,
        _gradients((2, 320, 16, 16), (320, 320, 3, 3), torch.bfloat16),
    ),
    "vectors, one pixel": (
        _aten.convolution.default,
        _convolution((2, 96, 31, 31), (32, 96, 1, 1), torch.bfloat16),
    ),
    "vectors, one pixel backward": (
        _aten.convolution_backward.default,
        _gradients((2, 96, 31, 31), (32, 96, 1, 1), torch.bfloat16),
    ),
    "vectors, backward": (
        _aten.convolution_backward.default,
        _gradients((2, 96, 61, 61), (32, 96, 3, 3), torch.bfloat16),
    ),
    "several images backward": (
        _aten.convolution_backward.default,
        _gradients((3, 64, 31, 31), (64, 64, 3, 3), torch.float32),
    ),
    "backward": (_aten.convolution_backward.default, _gradients((1, 320, 32, 32), (320, 320, 3, 3), torch.float32)),
    "norm of a view": (
        _aten.native_layer_norm.default,
        (torch.randn(1, 320, 1021).transpose(1, 2), [320], torch.ones(320), torch.zeros(320), 1e-5),
    ),
    "norm": (
        _aten.native_layer_norm.default,
        (torch.randn(1, 1021, 320), [320], torch.ones(320), torch.zeros(320), 1e-5),
    ),
}


def tile_scratch(dtype: torch.dtype) -> int:
    """What AMX takes beside in a thread for convolutions of bfloat16, which the prediction leaves out: up to 1 MiB."""
    return 2**20 if cpu_products(dtype) == "tiles" else 0


@pytest.mark.parametrize("case", CASES)
def test_temporaries_are_the_measured_ones(case: str) -> None:
    func, args = CASES[case]
    products = cpu_products(torch.bfloat16)
    if case.startswith("unfolded") and products is not None:
        pytest.skip("oneDNN multiplies bfloat16 on this processor")
    if case.startswith("vectors") and products == "tiles":
        pytest.skip("oneDNN multiplies bfloat16 by tiles on this processor")
    result = func(*args)
    results = result if isinstance(result, tuple) else (result,)
    predicted = sum(tensor.nbytes for tensor in results) + max(cpu_temporaries(func, args, result), default=0)
    assert predicted == pytest.approx(peak_memory(lambda: func(*args)), rel=0.05, abs=tile_scratch(args[0].dtype))


@pytest.mark.parametrize("case", CASES)
def test_other_devices_have_none_that_are_known(case: str) -> None:
    func, args = CASES[case]
    assert no_temporaries(func, args, func(*args)) == ()
