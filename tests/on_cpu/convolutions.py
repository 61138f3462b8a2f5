"""Small convolutions, UNets and what tests compare of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory

SHAPES = [  # channels in and out, kernel, stride, padding, dilation
    (37, 53, 3, 1, 1, 1),
    (37, 53, 3, 2, 1, 1),
    (37, 53, 3, 2, 0, 1),
    (61, 3, 1, 1, 0, 1),
    (3, 61, (3, 1), (2, 1), (1, 0), (2, 1)),
    (131, 67, 5, 1, 2, 2),
]
SIZES = [  # channels in and out, pixels of a row, kernel, stride
    (509, 521, 13, 3, 1),  # a small image
    (509, 521, 13, 3, 2),
    (257, 521, 13, 1, 1),
    (131, 521, 15, 1, 2),
    (257, 131, 31, 3, 1),
    (61, 67, 13, 3, 1),
    (131, 5, 31, 3, 1),  # fewer channels than a block has
    (257, 131, 31, 1, 2),
]
_NAMES = ("kernel_size", "stride", "padding", "dilation")


def convolution(dtype: torch.dtype = torch.bfloat16, channels: int = 37, outputs: int = 53, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, **{"kernel_size": 3, "padding": 1, **more}).to(dtype).requires_grad_(False)


def shaped(shape: tuple[Any, ...], dtype: torch.dtype, *, bias: bool = True) -> nn.Conv2d:
    """A convolution of one of `SHAPES`."""
    channels, outputs, *sizes = shape
    return convolution(dtype, channels, outputs, bias=bias, **dict(zip(_NAMES, sizes, strict=True)))


def sized(sizes: tuple[int, ...], items: int, dtype: torch.dtype) -> tuple[nn.Conv2d, Tensor]:
    """A convolution of one of `SIZES`, and so many images."""
    channels, outputs, edge, kernel, stride = sizes
    conv = convolution(dtype, channels, outputs, kernel_size=kernel, stride=stride, padding=kernel // 2)
    return conv, image(items, channels, edge, edge, dtype=dtype)


def image(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(sizes).to(dtype)


def unet(dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    return (
        UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=13,
            attention_head_dim=4,
            norm_num_groups=8,
            **more,
        )
        .to(dtype)
        .requires_grad_(False)
    )


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def assert_takes_what_it_says(conv: Any, x: Tensor) -> None:
    """A call of a prepared convolution takes no more than its `scratch_bytes`, which are hardly more."""
    result = conv(x)
    taken = peak_memory(lambda: conv(x)) - result.nbytes
    said = conv.scratch_bytes(len(x), x[0, 0].numel(), result[0, 0].numel())
    assert taken <= said <= 1.05 * taken, (taken, said)


def assert_as_exact(found: Tensor, plain: Tensor, conv: nn.Conv2d, x: Tensor) -> None:
    """`found` is a result of the convolution with at most twice the error of its `plain` result."""
    wide = None if conv.bias is None else conv.bias.double()
    padding: Any = conv.padding
    exact = F.conv2d(x.double(), conv.weight.double(), wide, conv.stride, padding, conv.dilation)
    assert found.dtype == x.dtype
    assert found.shape == plain.shape
    allowed = 2 * float((plain.double() - exact).norm()) + torch.finfo(x.dtype).eps / 2 * float(exact.norm())
    assert float((found.double() - exact).norm()) <= allowed
