"""What prepared convolutions have in common: how their kernel moves, and which images they take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.layers.plain_module import has_own
from slicemod.on_cpu.plain_convolution import convolution_bytes
from slicemod.on_cpu.prepared import Prepared


class Window(NamedTuple):
    """How a convolution's kernel moves over the image; each a number of rows and one of columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Window:
        """That of a convolution whose padding is given in numbers."""
        pairs: Any = (conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation)
        return cls(*((int(rows), int(columns)) for rows, columns in pairs))

    def output(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the output for an image `(B, C, H, W)`; less than one where it is too small."""
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

    def unfolding_bytes(self, channels: int, pixels: int, results: int) -> tuple[int, int]:
        """Bytes while an image of so many pixels in float32 is unfolded, and afterwards, for `results` pixels.

        PyTorch begins with a tensor as large as the image, and enlarges it if it is too small.
        """
        if self == _ONE_PIXEL:
            return 0, 0
        image, patches = 4 * channels * pixels, 4 * channels * math.prod(self.kernel) * results
        return (image + patches, patches) if patches > image else (image, image)


_ONE_PIXEL = Window((1, 1), (1, 1), (0, 0), (1, 1))


class PreparedConv2d(Prepared, nn.Conv2d):
    """A prepared convolution."""

    plain = nn.Conv2d

    def takes(self, given: Tensor) -> bool:
        """The call is no more than an inference of images that the kernel fits into, by all that is in the weight.

        Programs change what is computed, for example where pictures can be tiled.
        """
        if not super().takes(given) or not has_own(nn.Conv2d, "_conv_forward") or "_conv_forward" in vars(self):
            return False
        is_plain = self.padding_mode == "zeros" and self.groups == 1
        if not is_plain or any(type(sizes) is not tuple for sizes in (self.stride, self.padding, self.dilation)):
            return False
        return given.dim() == 4 and given.shape[1] == self.weight.shape[1] and min(Window.of(self).output(given)) > 0

    def scratch_bytes(self, items: int, pixels: int, results: int) -> int:
        """Bytes that an inference takes beyond its result, at most. Here they are those of a plain convolution.

        Args:
            items: images of the input, without gaps.
            pixels: of each of them.
            results: pixels of each image of the output.
        """
        outputs, channels, *_ = weight = self.weight.shape
        return max(convolution_bytes((items, channels, pixels), weight, (items, outputs, results), self.weight.dtype))
