"""How tall the strips of each layer are, and what that takes: plain ints, made from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slicemod.memory.sizes import exact_size_text
from slicemod.plan import NotEnoughMemoryError

# Elements that a layer holds beside its input and output to run at full speed. For CPUs measured on two cores, where
# larger strips were no faster; for other devices an estimate.
_FULL_SPEED_ON_CPU, _FULL_SPEED = 6 * 2**20, 2**26

Kind = Literal["convolution", "resnet", "upsample", "downsample", "whole"]


@dataclass(frozen=True)
class LayerSizes:
    """One layer in plain values.

    Attributes:
        kind: what it does.
        channels: of its input.
        out: channels of its output.
    """

    kind: Kind
    channels: int
    out: int


@dataclass(frozen=True)
class StripPlan:
    """How the image goes through an encoder or decoder, one item of the batch at a time.

    Attributes:
        rows: for each layer, how many rows of its output are computed at a time.
        peak_bytes: the most bytes that are held at once beyond the input: activations and strips, and the output. What
            the attention takes has a plan of its own.
        strip_bytes: the most bytes that a layer holds beside its input and its output.
    """

    rows: tuple[int, ...]
    peak_bytes: int
    strip_bytes: int

    def __str__(self) -> str:
        return f"strips of {min(self.rows)} to {max(self.rows)} rows, {self.strip_bytes:,} of {self.peak_bytes:,} bytes"


def plan_strips(
    layers: Sequence[LayerSizes], image: tuple[int, int, int], itemsize: int, free_bytes: int, device_type: str = "cpu"
) -> StripPlan:
    """Strips as tall as fit `free_bytes` beside a layer's input and output, and no taller than helps.

    Args:
        layers: the layers in order.
        image: items, height and width of the input.
        itemsize: bytes of an element.
        free_bytes: what a layer may hold beside its input and its output.
        device_type: where it runs.

    Raises:
        NotEnoughMemoryError: not even a strip of one row fits.

    >>> plan_strips([LayerSizes("resnet", 256, 128)], (1, 512, 512), 4, 2**24).rows
    (8,)
    """
    items, height, width = image
    target = min(free_bytes, itemsize * (_FULL_SPEED_ON_CPU if device_type == "cpu" else _FULL_SPEED))
    rows, peak, strips = [], 0, 0
    for layer in layers:
        height, width, before = _after(layer, height, width)
        most = max(1, (target - _strip_bytes(layer, 0, width, itemsize)) // _bytes_of_a_row(layer, width, itemsize))
        tall = height if layer.kind == "whole" else min(height, most)
        strip = 0 if layer.kind == "whole" else _strip_bytes(layer, tall, width, itemsize)
        if strip > free_bytes:
            raise NotEnoughMemoryError(
                f"VAE: needs {exact_size_text(strip)} for a strip of one row and has {exact_size_text(free_bytes)}, "
                f"for {layer.kind} of {layer.channels} channels and {width} pixels a row. Raise the budget or lower "
                "the resolution."
            )
        rows.append(tall)
        strips = max(strips, strip)
        given, made = layer.channels * before * itemsize, layer.out * height * width * itemsize
        # A resnet holds its input, and a tensor of the size of its output. Others free what they have read.
        peak = max(peak, strip + (given + made if layer.kind == "resnet" else max(given, made)))
    output = layers[-1].out * height * width * itemsize
    return StripPlan(tuple(rows), peak + (items - 1) * output, strips)


def _after(layer: LayerSizes, height: int, width: int) -> tuple[int, int, int]:
    """Height and width of the output, and the pixels of the input."""
    if layer.kind == "upsample":
        return 2 * height, 2 * width, height * width
    if layer.kind == "downsample":
        return (height - 2) // 2 + 1, (width - 2) // 2 + 1, height * width
    return height, width, height * width


def _strip_bytes(layer: LayerSizes, rows: int, width: int, itemsize: int) -> int:
    """Bytes of a strip: the rows with their neighbours, what a norm or oneDNN makes of them, and the result."""
    border = 0 if layer.kind == "whole" else 2
    return (rows + border) * _input_row(layer, width, itemsize) + rows * _output_row(layer, width, itemsize)


def _bytes_of_a_row(layer: LayerSizes, width: int, itemsize: int) -> int:
    return _input_row(layer, width, itemsize) + _output_row(layer, width, itemsize)


def _input_row(layer: LayerSizes, width: int, itemsize: int) -> int:
    pixels = 4 * width if layer.kind == "downsample" else width  # of the input for a row of the output
    return 2 * max(layer.channels, layer.out if layer.kind == "resnet" else 0) * pixels * itemsize


def _output_row(layer: LayerSizes, width: int, itemsize: int) -> int:
    held = 3 if layer.kind == "resnet" else 2  # the strip above is freed once this one is there
    return held * layer.out * width * itemsize
