"""Computes the layers of an encoder or decoder, strip by strip, as a plan says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.config import SliceConfig
from slicemod.layers.plain_module import runs_alone
from slicemod.torch_internals import is_any_autocast_enabled
from slicemod.vae.group_norm import apply_group_norm, channel_moments
from slicemod.vae.layers import Convolution, Layer, Resnet, Upsample, Whole
from slicemod.vae.plan import Convolving, Kind, LayerSizes, StripPlan, plan_strips
from slicemod.vae.strips import Strips, bounds


class ConvolutionWeights(NamedTuple):
    """What a convolution is computed by. An `nn.Conv2d` has the same names."""

    weight: Tensor
    bias: Tensor | None
    stride: int = 1


def run(layers: Sequence[Layer], images: Tensor, plan: StripPlan) -> Tensor:
    """The output of the last layer for `(B, C, H, W)`, one item of the batch after the other."""
    outputs = []
    for item in range(len(images)):
        strips = Strips.of(images[item : item + 1])
        for layer, rows in zip(layers, plan.rows, strict=True):
            strips = _computed(layer, strips, rows)
        outputs.append(strips.whole())
    if not outputs:
        raise ValueError(f"images: expected one at least; got {tuple(images.shape)}. Pass a batch that is not empty.")
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def planned(
    slicing: SliceConfig, device: str, layers: Sequence[tuple[Kind, int, int]], image: Sequence[int], dtype: torch.dtype
) -> StripPlan:
    """The plan of layers, as `sizes` gives them, for an `image` of so many items, rows and columns."""
    where = torch.device(device)
    items, height, width = image
    free = slicing.parsed_budget.bytes_on(where)
    described = [LayerSizes(*fields) for fields in layers]
    return plan_strips(described, (items, height, width), Convolving.of(dtype, where.type), free)


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
        return Strips.of(attended(layer.module, image.whole()))
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


def attended(module: nn.Module, image: Tensor) -> Tensor:
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
        _add_residual(strip, image.rows(row - strip.shape[2], row), layer.shortcut)
        if layer.scale != 1:
            strip /= layer.scale
        output.append(strip)
        image.free_above(row)
    between.free_above(between.height)
    return output


def _add_residual(strip: Tensor, residual: Tensor, shortcut: Any) -> None:
    """Add the residual, or what the shortcut makes of it, to a strip of the output.

    oneDNN's convolution of single pixels would sum half precision in float32, for the whole strip in each thread.
    """
    if shortcut is None:
        strip += residual
    elif _is_plain(shortcut) and shortcut.weight[0, 0].numel() == 1 and not is_any_autocast_enabled():
        weight, pixels = shortcut.weight.flatten(1), residual[0].flatten(1)  # (C', C), (C, h W)
        output = strip[0].view(len(weight), -1)  # (C', h W)
        if in_float32(strip):
            output += weight.float() @ pixels.float()
        else:
            output.addmm_(weight, pixels)
        if shortcut.bias is not None:
            output += shortcut.bias[:, None]
    else:
        strip += shortcut(residual)


def _convolved(layer: Convolution, image: Strips, rows: int) -> Iterator[tuple[Tensor, int]]:
    """Strips of the output from top to bottom, each with the row at which it ends."""
    moments = None if layer.norm is None else channel_moments(image, layer.norm.num_groups, rows)
    for start, stop in bounds(image.height, rows):
        first, last = max(start - 1, 0), min(stop + 1, image.height)
        patch = image.rows(first, last)
        if layer.norm is not None and moments is not None:
            patch = apply_group_norm(layer.norm, patch, moments)
        if layer.activation is not None:
            patch = layer.activation(patch)
        patch, lacks = _bordered(layer.conv, patch, (start == first, last == stop))
        strip = _convolve(layer.conv, patch, lacks)
        del patch  # frees it before whoever gets the strip goes on
        yield strip, stop


def _upsampled(conv: Any, image: Strips, start: int, stop: int) -> Tensor:
    """Rows of the enlarged and convolved image."""
    first, last = max(start - 1, 0), min(stop + 1, 2 * image.height)
    patch = image.rows(first // 2, (last + 1) // 2)
    patch = F.interpolate(patch, scale_factor=2.0, mode="nearest")
    patch = patch[:, :, first % 2 : first % 2 + last - first]
    patch, lacks = _bordered(conv, patch, (start == first, stop == last))
    if not (patch.is_contiguous() or patch.is_contiguous(memory_format=torch.channels_last)):
        patch = patch.clone()  # as the convolution would do it, beside all of the enlarged rows
    return _convolve(conv, patch, lacks)


def _downsampled(conv: Any, image: Strips, start: int, stop: int) -> Tensor:
    """Rows of the convolved image of half the size."""
    last = min(2 * stop + 1, image.height)
    patch = F.pad(image.rows(2 * start, last), (0, 1, 0, 2 * stop + 1 - last))
    output: Tensor = _called(conv, patch, 0) if _is_plain(conv) else conv(patch)
    return output


def _bordered(conv: Any, patch: Tensor, lacks: tuple[bool, bool]) -> tuple[Tensor, tuple[bool, bool]]:
    """The patch, and whether it still `lacks` the row above and the row below, which are zeros.

    The convolution adds them itself on both sides, or on none.
    """
    above, below = lacks
    if above == below or not _is_plain(conv):
        return patch, lacks
    return F.pad(patch, (0, 0, int(above), int(below))), (False, False)


def _convolve(conv: Any, patch: Tensor, lacks: tuple[bool, bool]) -> Tensor:
    """A convolution of 3x3 pixels of a patch that has a row more above and below, except where it `lacks` one.

    A module that is more than a convolution, such as one with LoRA, is called as it is. It adds its border to every
    side, and the rows that come from it are dropped.
    """
    above, below = lacks
    if not _is_plain(conv):
        output: Tensor = conv(patch)
        return output[:, :, 0 if above else 1 : None if below else -1]
    return _called(conv, patch, (int(above), 1))


def _is_plain(conv: Any) -> bool:
    """It is computed by its weights alone. A tracer cannot look at all that `runs_alone` looks at."""
    if type(conv) is ConvolutionWeights:
        return True
    if type(conv) is not nn.Conv2d or conv._forward_hooks or conv._forward_pre_hooks:
        return False
    return torch.compiler.is_compiling() or runs_alone(conv)


def _called(conv: Any, patch: Tensor, padding: int | tuple[int, int]) -> Tensor:
    """The convolution of a patch with a padding of zeros."""
    weight, bias = conv.weight, conv.bias
    if in_float32(patch):
        bias = None if bias is None else bias.float()
        return F.conv2d(patch.float(), weight.float(), bias, conv.stride, padding).to(patch.dtype)
    return F.conv2d(patch, weight, bias, conv.stride, padding)


def in_float32(tensor: Tensor) -> bool:
    """Half precision that this CPU does not multiply. PyTorch would unfold its patches, and take a hundred times as
    long."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and Convolving.of(tensor.dtype, "cpu").in_float32
