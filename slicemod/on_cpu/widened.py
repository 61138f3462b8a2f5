"""Convolutions and linear layers in half precision on a CPU that does not multiply it: computed in float32.

PyTorch's own product of half precision takes eight times as long there as that of float32, and its convolution some
hundred times. Here the weights of some output channels at a time are widened, so that the copy stays small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.on_cpu.convolution import PreparedConv2d, Window
from slicemod.on_cpu.plain_convolution import convolution_bytes
from slicemod.on_cpu.prepared import Prepared
from slicemod.on_cpu.unfolded import is_small, multiply
from slicemod.rounding import ceil_div

# Bytes of a weight that are widened at a time: for a convolution, for that of a small image, and for a linear layer;
# and of the latter's input how many rows. Less would take longer. Measured on an AMD EPYC (Zen 3) of two cores.
_CONVOLUTION, _SMALL_CONVOLUTION, _PRODUCT = 2**23, 2**24, 2**21
_ROWS = 256


class WidenedConv2d(PreparedConv2d):
    """A convolution in half precision that is computed in float32."""

    way = "in float32"

    def compute(self, given: Tensor) -> Tensor:
        """`(B, O, h, w)` of `(B, C, H, W)`."""
        output = given.new_empty(len(given), len(self.weight), *Window.of(self).output(given))
        for item, image in zip(output, torch.split(given, 1), strict=True):
            self._compute_image(image.float(), item)  # which goes before the next one comes
        return output

    def _compute_image(self, image: Tensor, output: Tensor) -> None:
        """Write the output `(O, h, w)` for an image `(1, C, H, W)` in float32."""
        patches = Window.of(self).unfolded(image) if is_small(self.weight, output[0].numel()) else None
        for channels in self._parts(output[0].numel()):
            self._compute_channels(channels, image, patches, output[channels])

    def _parts(self, results: int) -> list[slice]:
        """The output channels that are computed together for an output of so many pixels."""
        return _chunks(self.weight, _SMALL_CONVOLUTION if is_small(self.weight, results) else _CONVOLUTION)

    def _compute_channels(self, channels: slice, image: Tensor, patches: Tensor | None, output: Tensor) -> None:
        """Write some channels `(o, h, w)` of the output for an image `(1, C, H, W)` in float32."""
        weight, bias = _widened(self, channels)
        if patches is None:
            output.copy_(F.conv2d(image, weight, bias, self.stride, self.padding, self.dilation)[0])
        else:
            found = patches.new_empty(len(weight), patches.shape[1])
            multiply(weight.flatten(1), patches, bias, into=found)
            output.copy_(found.view_as(output))

    def scratch_bytes(self, items: int, pixels: int, results: int) -> int:
        """Bytes that an inference takes beyond its result: an image and a part of the weight in float32."""
        del items  # they are computed one after the other
        channels, some = self.weight.shape[1], int(self._parts(results)[0].stop)
        image, weight, output = (1, channels, pixels), (some, *self.weight.shape[1:]), (1, some, results)
        widened: int = 4 * (math.prod(weight) + some + some * results)
        if is_small(self.weight, results):
            unfolding, patches = Window.of(self).unfolding_bytes(channels, pixels, results)
            return 4 * channels * pixels + max(unfolding, patches + widened)
        return 4 * channels * pixels + widened + max(convolution_bytes(image, weight, output, torch.float32))


class WidenedLinear(Prepared, nn.Linear):
    """A linear layer in half precision that is computed in float32."""

    plain, way = nn.Linear, "in float32"

    def takes(self, given: Tensor) -> bool:
        """The call is no more than an inference of tokens with as many channels as the weight."""
        return super().takes(given) and given.shape[-1:] == self.weight.shape[1:]

    def compute(self, given: Tensor) -> Tensor:
        """`(..., O)` of `(..., C)`."""
        tokens = given.reshape(-1, given.shape[-1])  # (T, C)
        output = given.new_empty(len(tokens), len(self.weight))
        for channels in _chunks(self.weight, _PRODUCT):
            self._compute_channels(channels, tokens, output[:, channels])
        return output.view(*given.shape[:-1], len(self.weight))

    def _compute_channels(self, channels: slice, tokens: Tensor, output: Tensor) -> None:
        """Write some channels `(T, o)` of the output."""
        weight, bias = _widened(self, channels)
        for rows, into in zip(torch.split(tokens, _ROWS), torch.split(output, _ROWS), strict=True):
            into.copy_(F.linear(rows.float(), weight, bias))

    def scratch_bytes(self, tokens: int | None = None) -> int:
        """Bytes that an inference of so many tokens, or of any number, takes beyond its result, at most."""
        channels, rows = int(_chunks(self.weight, _PRODUCT)[0].stop), _ROWS if tokens is None else min(tokens, _ROWS)
        return 4 * (channels * self.in_features + rows * (self.in_features + channels) + channels)


def largest_scratch(*projections: nn.Module) -> int:
    """The most bytes that a product of some projections takes itself; LoRA may have wrapped their linear layers."""
    parts = [part for projection in projections for part in projection.modules()]
    sizes = [part.scratch_bytes() for part in parts if isinstance(part, WidenedLinear)]
    return max(sizes) if sizes else 0  # the compiler of PyTorch 2.9 traces no `max` with a default


def _widened(module: nn.Conv2d | nn.Linear, channels: slice) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some output channels in float32."""
    bias = module.bias
    return module.weight[channels].float(), None if bias is None else bias[channels].float()


def _chunks(weight: Tensor, size: int) -> list[slice]:
    """The output channels whose weights are widened together, in bytes of float32 about `size` of them."""
    steps = ceil_div(4 * weight.numel(), size)
    step = ceil_div(len(weight), steps)
    return [slice(start, start + step) for start in range(0, len(weight), step)]
