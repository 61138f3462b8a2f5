"""Computes the layers of an encoder or decoder, strip by strip, as a plan says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.layers.plain_module import runs_alone
from slicemod.vae.group_norm import apply_group_norm, channel_moments
from slicemod.vae.layers import Convolution, Layer, Resnet, Upsample, Whole
from slicemod.vae.plan import Kind, StripPlan
from slicemod.vae.strips import Strips, bounds


def run(layers: Sequence[Layer], images: Tensor, plan: StripPlan) -> Tensor:
    """The output of the last layer for `(B, C, H, W)`, one item of the batch after the other."""
    outputs: Tensor | None = None
    for item in range(len(images)):
        strips = Strips.of(images[item : item + 1])
        for layer, rows in zip(layers, plan.rows, strict=True):
            strips = _computed(layer, strips, rows)
        if len(images) == 1:
            return strips.whole()
        output = strips.whole()
        if outputs is None:
            outputs = output.new_empty(len(images), *output.shape[1:])
            if not output.is_contiguous():
                outputs = outputs.contiguous(memory_format=torch.channels_last)
        outputs[item] = output[0]
    if outputs is None:
        raise ValueError(f"images: expected one at least; got {tuple(images.shape)}. Pass a batch that is not empty.")
    return outputs


def sizes(layers: Sequence[Layer]) -> tuple[tuple[Kind, int, int], ...]:
    """The fields of the `LayerSizes` of each layer; plain values, which become constants if a graph is traced."""
    return tuple(_sizes(layer) for layer in layers)


def _sizes(layer: Layer) -> tuple[Kind, int, int]:
    if isinstance(layer, Whole):
        return "whole", layer.channels, layer.channels
    if isinstance(layer, Resnet):
        return "resnet", layer.first.conv.weight.shape[1], layer.second.conv.weight.shape[0]
    kind: Kind = "convolution"
    if not isinstance(layer, Convolution):
        kind = "upsample" if isinstance(layer, Upsample) else "downsample"
    return kind, layer.conv.weight.shape[1], layer.conv.weight.shape[0]


def _computed(layer: Layer, image: Strips, rows: int) -> Strips:
    """The output of a layer. The strips of its input are freed on the way."""
    if isinstance(layer, Whole):
        return Strips.of(_attended(layer.module, image.whole()))
    if isinstance(layer, Resnet):
        return _resnet(layer, image, rows)
    output = Strips()
    if isinstance(layer, Convolution):
        for strip, row in _convolved(layer, image, rows):
            output.append(strip)
            image.free_above(row - 1)
    elif isinstance(layer, Upsample):
        for start, stop in bounds(2 * image.height, rows):
            output.append(_upsampled(layer.conv, image, start, stop))
            image.free_above((stop - 1) // 2)
    else:
        for start, stop in bounds((image.height - 2) // 2 + 1, rows):
            output.append(_downsampled(layer.conv, image, start, stop))
            image.free_above(2 * stop)
    image.free_above(image.height)
    return output


def _attended(module: nn.Module, image: Tensor) -> Tensor:
    """The output of the module in the layout of the image: attention often gives channels last."""
    output: Tensor = module(image)
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _resnet(layer: Resnet, image: Strips, rows: int) -> Strips:
    """A strip of the output takes the place of a strip of the input and of one between the convolutions."""
    between, output = Strips(), Strips()
    for strip, _ in _convolved(layer.first, image, rows):
        between.append(strip)
    for strip, row in _convolved(layer.second, between, rows):
        between.free_above(row - 1)
        residual = image.rows(row - strip.shape[2], row)
        if layer.shortcut is not None:
            residual = layer.shortcut(residual)
        strip += residual
        del residual
        if layer.scale != 1:
            strip /= layer.scale
        output.append(strip)
        image.free_above(row)
    between.free_above(between.height)
    return output


def _convolved(layer: Convolution, image: Strips, rows: int) -> Iterator[tuple[Tensor, int]]:
    """Strips of the output from top to bottom, each with the row at which it ends."""
    moments = None if layer.norm is None else channel_moments(image, layer.norm.num_groups)
    for start, stop in bounds(image.height, rows):
        first, last = max(start - 1, 0), min(stop + 1, image.height)
        patch = image.rows(first, last)
        if layer.norm is not None and moments is not None:
            patch = apply_group_norm(layer.norm, patch, moments)
        if layer.activation is not None:
            patch = layer.activation(patch)
        border = start - first == 0, last - stop == 0  # beyond the image are zeros
        yield _convolve(layer.conv, patch, border), stop


def _upsampled(conv: Any, image: Strips, start: int, stop: int) -> Tensor:
    """Rows of the enlarged and convolved image."""
    first, last = max(start - 1, 0), min(stop + 1, 2 * image.height)
    patch = image.rows(first // 2, (last + 1) // 2)
    patch = F.interpolate(patch, scale_factor=2.0, mode="nearest")
    patch = patch[:, :, first % 2 : first % 2 + last - first]
    return _convolve(conv, patch, (start == first, stop == last))


def _downsampled(conv: Any, image: Strips, start: int, stop: int) -> Tensor:
    """Rows of the convolved image of half the size."""
    last = min(2 * stop + 1, image.height)
    below = 2 * stop + 1 - last
    patch: Tensor = conv(F.pad(image.rows(2 * start, last), (0, 1, 0, below)))
    return patch


def _convolve(conv: Any, patch: Tensor, border: tuple[bool, bool]) -> Tensor:
    """A convolution of 3x3 pixels of a patch that has a row more above and below, except where it has a `border`.

    A module that is more than a convolution, such as one with LoRA, is called as it is. It adds its border to every
    side, and the rows that come from it are dropped.
    """
    above, below = border
    plain = type(conv) is nn.Conv2d and (torch.compiler.is_compiling() or runs_alone(conv))
    if not plain:
        output: Tensor = conv(patch)
        return output[:, :, 0 if above else 1 : None if below else -1]
    if above == below:
        return F.conv2d(patch, conv.weight, conv.bias, padding=(int(above), 1))
    return F.conv2d(F.pad(patch, (0, 0, int(above), int(below))), conv.weight, conv.bias, padding=(0, 1))
