"""Convolutions of small images as one product with the unfolded image.

oneDNN copies the weight of a convolution into blocks of channels in each call. In the small images at the bottom of a
UNet this copy is much larger than the image, and takes longer than the convolution. There the image is unfolded
instead: `(C, H, W)` becomes a matrix of `C kh kw` rows, and the convolution is the product of the weight, as it is,
with this matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slicemod.on_cpu.convolution import PreparedConv2d, Window


def is_small(weight: Tensor, pixels: int) -> bool:
    """The unfolded image of an output of so many pixels is at most half as large as the weight `(O, C, kh, kw)`.

    Then it takes less memory than the copy of the weight, and less time. Measured on AMD's Zen 3 and Zen 4.
    """
    return 2 * pixels <= weight.shape[0]


class UnfoldedConv2d(PreparedConv2d):
    """A convolution in float32 that is a product where the image is small."""

    way = "unfolded where the image is small"

    def takes(self, given: Tensor) -> bool:
        """The call is no more than an inference of small images."""
        if not super().takes(given):
            return False
        rows, columns = Window.of(self).output(given)
        return is_small(self.weight, rows * columns)

    def compute(self, given: Tensor) -> Tensor:
        """`(B, O, h, w)` of `(B, C, H, W)`."""
        window, weight = Window.of(self), self.weight.flatten(1)  # (O, C kh kw)
        output = given.new_empty(len(given), len(weight), *window.output(given))
        for item, image in zip(output, torch.split(given, 1), strict=True):
            multiply(weight, window.unfolded(image), self.bias, into=item.flatten(1))
        return output

    def scratch_bytes(self, items: int, pixels: int, results: int) -> int:
        """Bytes that an inference takes beyond its result: one unfolded image, if it is small."""
        if is_small(self.weight, results):
            return max(Window.of(self).unfolding_bytes(self.weight.shape[1], pixels, results))
        return super().scratch_bytes(items, pixels, results)


def multiply(weight: Tensor, patches: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """Write the product `(O, h w)` of a weight `(O, K)` and patches `(K, h w)`."""
    if bias is None:
        torch.mm(weight, patches, out=into)
    else:
        torch.addmm(bias[:, None], weight, patches, out=into)
