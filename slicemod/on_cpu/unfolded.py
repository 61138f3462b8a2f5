"""Convolutions of small images as one product with the unfolded image.

oneDNN copies the weight of a convolution into blocks of channels in each call. In the small images at the bottom of a
UNet this copy is much larger than the image, and takes longer than the convolution. There the image is unfolded
instead: `(C, H, W)` becomes a matrix of `C kh kw` rows, and the convolution is the product of the weight, as it is,
with this matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.on_cpu.prepared import Prepared, is_only_inference, is_other_convolution


class Window(NamedTuple):
    """How a convolution's kernel moves over the image; each a number of rows and one of columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Window:
        """That of a convolution whose padding is given in numbers."""
        pairs: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        return cls(*((int(rows), int(columns)) for rows, columns in pairs))

    def output(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the output for an image `(B, C, H, W)`."""
        rows, columns = (
            (size + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1) // self.stride[axis] + 1
            for axis, size in enumerate(image.shape[2:])
        )
        return rows, columns

    def unfolded(self, image: Tensor) -> Tensor:
        """`(C kh kw, h w)` of one image `(1, C, H, W)`."""
        if self == _ONE_PIXEL and image.is_contiguous():
            return image[0].flatten(1)
        return F.unfold(image, self.kernel, self.dilation, self.padding, self.stride)[0]


_ONE_PIXEL = Window((1, 1), (1, 1), (0, 0), (1, 1))


def is_small(weight: Tensor, pixels: int) -> bool:
    """The unfolded image of an output of so many pixels is at most half as large as the weight `(O, C, kh, kw)`.

    Then it takes less memory than the copy of the weight, and less time. Measured on AMD's Zen 3 and Zen 4.
    """
    return 0 < 2 * pixels <= weight.shape[0]


class UnfoldedConv2d(Prepared, nn.Conv2d):
    """A convolution in float32 that is a product where the image is small."""

    plain, way = nn.Conv2d, "unfolded where the image is small"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
        """`(B, O, h, w)` of `(B, C, H, W)`."""
        if is_other_convolution(self, input) or not is_only_inference(self, input):
            return super().forward(input)
        window = Window.of(self)
        rows, columns = window.output(input)
        if not is_small(self.weight, rows * columns):
            return super().forward(input)
        output = input.new_empty(len(input), self.out_channels, rows, columns)
        weight = self.weight.flatten(1)  # (O, C kh kw)
        for item, image in zip(output, torch.split(input, 1), strict=True):
            multiply(weight, window.unfolded(image), self.bias, into=item.flatten(1))
        return output


def multiply(weight: Tensor, patches: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """Write the product `(O, h w)` of a weight `(O, K)` and patches `(K, h w)`."""
    if bias is None:
        torch.mm(weight, patches, out=into)
    else:
        torch.addmm(bias[:, None], weight, patches, out=into)
