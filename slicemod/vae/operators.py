"""The layers of a VAE, strip by strip, as one operator of a traced graph.

A compiler that sees the loop unrolls it, and holds as many strips at once as it likes. An operator takes tensors and
numbers alone, so the layers are written down as these, and are read again where the operator runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slicemod.config import SETTINGS, SliceConfig
from slicemod.operator import operator
from slicemod.torch_internals import is_any_autocast_enabled
from slicemod.vae.layers import Convolution, Downsample, Layer, Resnet, Upsample, Whole, silu
from slicemod.vae.plan import output_shape
from slicemod.vae.running import ConvolutionWeights, attended, planned, run, sizes
from slicemod.watched import PlainValues, constant_in_graph, plain_values

_CONVOLUTION, _RESNET, _UPSAMPLE, _DOWNSAMPLE = range(4)


class _NormWeights(NamedTuple):
    """Of a group norm, which has the same names."""

    weight: Tensor | None
    bias: Tensor | None
    num_groups: int
    eps: float


def run_in_graph(layers: Sequence[Layer], images: Tensor, slicing: SliceConfig) -> Tensor | None:
    """What `run` computes by a plan, for a graph that is traced. The strips are planned when the graph runs.

    None for what is more than a convolution, for other activations than SiLU, and under autocast.
    """
    if is_any_autocast_enabled() or not all(_is_plain(layer) for layer in layers):
        return None
    settings = _as_text(plain_values(slicing, SETTINGS))
    before: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Whole):
            images = _stripwise(before, images, settings)
            images = torch.cat([attended(layer.module, images[item : item + 1]) for item in range(len(images))])
            before = []
        else:
            before.append(layer)
    return _stripwise(before, images, settings)


@constant_in_graph
def _as_text(settings: PlainValues) -> str:
    return json.dumps(dict(zip(SETTINGS, settings, strict=True)))


def _stripwise(layers: list[Layer], images: Tensor, settings: str) -> Tensor:
    if not layers:
        return images
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for layer in layers:
        _write(layer, tensors, numbers)
    output: Tensor = vae_layers(images, tensors, numbers, settings)
    return output


@operator("slicemod::vae_layers")
def vae_layers(images: Tensor, tensors: list[Tensor], numbers: list[float], settings: str) -> Tensor:
    """The output of layers, written down as `tensors` and `numbers`, for `(B, C, H, W)`.

    Raises:
        NotEnoughMemoryError: not even a strip of one row fits the budget of the `settings`.
    """
    layers = _read(tensors, numbers)
    items, _, *edges = images.shape
    slicing = SliceConfig.of(json.loads(settings))
    plan = planned(slicing, str(images.device), sizes(layers), (items, *edges), images.dtype)
    output = run(layers, images, plan)
    return output.contiguous(memory_format=_layout(images))


@vae_layers.register_fake
def _(images: Tensor, tensors: list[Tensor], numbers: list[float], settings: str) -> Tensor:
    items, _, height, width = images.shape
    shape = output_shape(sizes(_read(tensors, numbers)), items, height, width)
    return images.new_empty(shape).contiguous(memory_format=_layout(images))


def _layout(images: Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _is_plain(layer: Layer) -> bool:
    if isinstance(layer, Whole):
        return True
    if isinstance(layer, Convolution):
        return _has_weights_alone(layer.conv) and (layer.activation is None or layer.activation is silu)
    if isinstance(layer, Resnet):
        shortcut = layer.shortcut is None or _has_weights_alone(layer.shortcut)
        return _is_plain(layer.first) and _is_plain(layer.second) and shortcut
    return _has_weights_alone(layer.conv)


def _has_weights_alone(conv: Any) -> bool:
    return type(conv) is nn.Conv2d and not (conv._forward_hooks or conv._forward_pre_hooks)


def _write(layer: Any, tensors: list[Tensor], numbers: list[float]) -> None:
    if isinstance(layer, Convolution):
        numbers.append(_CONVOLUTION)
        _write_convolution(layer, tensors, numbers)
    elif isinstance(layer, Resnet):
        numbers.append(_RESNET)
        _write_convolution(layer.first, tensors, numbers)
        _write_convolution(layer.second, tensors, numbers)
        numbers.append(layer.scale)
        numbers.append(layer.shortcut is not None)
        if layer.shortcut is not None:
            _write_weights(layer.shortcut, tensors, numbers)
    else:
        numbers.append(_UPSAMPLE if isinstance(layer, Upsample) else _DOWNSAMPLE)
        _write_weights(layer.conv, tensors, numbers)


def _write_convolution(layer: Convolution, tensors: list[Tensor], numbers: list[float]) -> None:
    _write_weights(layer.conv, tensors, numbers)
    numbers.append(layer.activation is not None)
    numbers.append(layer.norm is not None)
    if layer.norm is not None:
        numbers.append(layer.norm.num_groups)
        numbers.append(layer.norm.eps)
        _write_tensors(layer.norm.weight, layer.norm.bias, tensors, numbers)


def _write_weights(conv: Any, tensors: list[Tensor], numbers: list[float]) -> None:
    numbers.append(conv.stride[0])
    _write_tensors(conv.weight, conv.bias, tensors, numbers)


def _write_tensors(weight: Tensor | None, bias: Tensor | None, tensors: list[Tensor], numbers: list[float]) -> None:
    for given in (weight, bias):
        numbers.append(given is not None)
        if given is not None:
            tensors.append(given)


def _read(tensors: Sequence[Tensor], numbers: Sequence[float]) -> list[Layer]:
    given, told = iter(tensors), iter(numbers)
    return [_layer(int(kind), given, told) for kind in told]


def _layer(kind: int, tensors: Iterator[Tensor], numbers: Iterator[float]) -> Layer:
    if kind == _CONVOLUTION:
        return _convolution(tensors, numbers)
    if kind == _RESNET:
        first, second = _convolution(tensors, numbers), _convolution(tensors, numbers)
        scale = next(numbers)
        return Resnet(first, second, _weights(tensors, numbers) if next(numbers) else None, scale)
    conv = _weights(tensors, numbers)
    return Upsample(conv) if kind == _UPSAMPLE else Downsample(conv)


def _convolution(tensors: Iterator[Tensor], numbers: Iterator[float]) -> Convolution:
    conv = _weights(tensors, numbers)
    activation = silu if next(numbers) else None
    norm: Any = None
    if next(numbers):
        groups, eps = int(next(numbers)), next(numbers)
        norm = _NormWeights(*_two_tensors(tensors, numbers), groups, eps)
    return Convolution(conv, norm, activation)


def _weights(tensors: Iterator[Tensor], numbers: Iterator[float]) -> ConvolutionWeights:
    stride = int(next(numbers))
    weight, bias = _two_tensors(tensors, numbers)
    if weight is None:
        raise ValueError("numbers: expected a convolution with a weight; got one without. Write the layers down anew.")
    return ConvolutionWeights(weight, bias, stride)


def _two_tensors(tensors: Iterator[Tensor], numbers: Iterator[float]) -> tuple[Tensor | None, Tensor | None]:
    weight = next(tensors) if next(numbers) else None
    return weight, next(tensors) if next(numbers) else None
