"""How tall the strips of each layer are, and what that takes: plain ints, made from sizes alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from slicemod.half_precision import Products, cpu_products
from slicemod.memory.sizes import exact_size_text
from slicemod.on_cpu.plain_convolution import SMALL_IMAGE
from slicemod.plan import NotEnoughMemoryError

# Elements that a layer holds beside its input and output to run at full speed. For CPUs measured on two cores, where
# larger strips were no faster; for other devices an estimate.
_FULL_SPEED_ON_CPU, _FULL_SPEED = 6 * 2**20, 2**26

# Bytes of a group norm's mean, variance, weight and bias for each channel in float32, and of those of its strips.
_STATISTICS = 32

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


class Convolving(NamedTuple):
    """What convolutions take, apart from their sizes.

    Attributes:
        itemsize: bytes of an element.
        device_type: where they run.
        products: how the CPU multiplies half precision; of `cpu_products`. It does not matter in float32.
    """

    itemsize: int
    device_type: str = "cpu"
    products: Products | None = "bfloat16"

    @classmethod
    def of(cls, dtype: torch.dtype, device_type: str) -> Convolving:
        """On this machine."""
        return cls(dtype.itemsize, device_type, cpu_products(dtype))

    @property
    def in_float32(self) -> bool:
        """Half precision is convolved in float32."""
        return self.device_type == "cpu" and self.itemsize == 2 and self.products is None

    def bytes_beside(self, patch: int, result: int) -> int:
        """Bytes beside the input, of `patch` bytes, with its `result`. Without the weight.

        oneDNN copies the input into blocks of channels, convolves into such blocks, and copies these into the result.
        """
        blocks = max(patch + result, 2 * result)
        return 2 * (patch + blocks) if self.in_float32 else blocks

    def sums(self, patch: int, result: int) -> int:
        """Bytes of a product with a weight that is added to its `result`, beside `patch` and `result`."""
        if self.in_float32:
            return 2 * (patch + result)
        return 2 * result if self.itemsize == 2 and self.products == "widened" else 0

    def bytes_beside_strips(self, weight: int, row: int, rows: int) -> int:
        """Bytes that do not grow with the strips: what a convolution makes of a weight of so many elements.

        Instead, PyTorch unfolds small patches in float32; of the patch the last strip may have few `rows` of `row`
        elements each.
        """
        copied = self.itemsize * weight * (4 if self.in_float32 else 1)
        if self.device_type != "cpu" or self.itemsize < 4 or 3 * row > SMALL_IMAGE:
            return copied
        return max(copied, 9 * self.itemsize * min(rows * row, SMALL_IMAGE))


@dataclass(frozen=True)
class StripPlan:
    """How the image goes through an encoder or decoder, one item of the batch at a time.

    Attributes:
        rows: for each layer, how many rows of its output are computed at a time.
        peak_bytes: the most bytes that are held at once beyond the input: activations, strips, the output, and oneDNN's
            copy of a weight. What the attention takes has a plan of its own.
        strip_bytes: the most bytes that a layer holds beside its input, its output and the copy of a weight.
    """

    rows: tuple[int, ...]
    peak_bytes: int
    strip_bytes: int

    def __str__(self) -> str:
        return f"strips of {min(self.rows)} to {max(self.rows)} rows, {self.strip_bytes:,} of {self.peak_bytes:,} bytes"


def plan_strips(
    layers: Sequence[LayerSizes], image: tuple[int, int, int], convolving: Convolving, free_bytes: int
) -> StripPlan:
    """Strips as tall as fit `free_bytes` beside a layer's input and output, and no taller than helps.

    Args:
        layers: the layers in order.
        image: items, height and width of the input.
        convolving: dtype and device.
        free_bytes: what a layer may hold beside its input and its output.

    Raises:
        NotEnoughMemoryError: not even a strip of one row fits.

    >>> plan_strips([LayerSizes("resnet", 256, 128)], (1, 512, 512), Convolving(4), 2**24).rows
    (11,)
    """
    items, height, width = image
    itemsize = convolving.itemsize
    full_speed = itemsize * (_FULL_SPEED_ON_CPU if convolving.device_type == "cpu" else _FULL_SPEED)
    rows, peak, strips = [], 0, 0
    before = 0  # bytes of a strip of the layer above
    for layer in layers:
        given = layer.channels * height * width * itemsize
        height, width = _size_after(layer.kind, height, width)
        made = layer.out * height * width * itemsize
        tall, strip = height, 0
        if layer.kind != "whole":
            tall = _most_rows(layer, height, width, convolving, min(free_bytes, full_speed))
            strip = _strip_bytes(layer, tall, width, convolving)
        if strip > free_bytes:
            raise NotEnoughMemoryError(
                f"VAE: needs {exact_size_text(strip)} for a strip of one row and has {exact_size_text(free_bytes)}, "
                f"for {layer.kind} of {layer.channels} channels and {width} pixels a row. Raise the budget or lower "
                "the resolution."
            )
        rows.append(tall)
        strips = max(strips, strip)
        # A resnet holds its input, and a tensor of the size of its output. Others free the strips that they have read.
        held = given + made if layer.kind in ("resnet", "whole") else max(given, made + min(given, before))
        widest = max(layer.channels, layer.out if layer.kind == "resnet" else 0)
        if layer.kind != "whole":
            held += convolving.bytes_beside_strips(9 * layer.out * widest, widest * width, tall + 2)
        peak = max(peak, held + strip)
        before = tall * layer.out * width * itemsize
    output = layers[-1].out * height * width * itemsize
    peak += (items - 1) * output  # those of the items before
    return StripPlan(tuple(rows), max(peak, 2 * items * output), strips)


def output_shape(
    layers: Sequence[tuple[Kind, int, int]], items: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """The shape `(B, C, H, W)` that layers, given by the fields of their sizes, make of images. May be traced."""
    for kind, _, _ in layers:
        height, width = _size_after(kind, height, width)
    return items, layers[-1][2], height, width


def _size_after(kind: Kind, height: int, width: int) -> tuple[int, int]:
    """Height and width of a layer's output."""
    if kind == "upsample":
        return 2 * height, 2 * width
    if kind == "downsample":
        return (height - 2) // 2 + 1, (width - 2) // 2 + 1
    return height, width


def _most_rows(layer: LayerSizes, height: int, width: int, convolving: Convolving, free_bytes: int) -> int:
    """The rows of the tallest strip that fits; one if none does."""
    rows = range(1, max(height, 1) + 1)
    return max(1, bisect_right(rows, free_bytes, key=lambda tall: _strip_bytes(layer, tall, width, convolving)))


def _strip_bytes(layer: LayerSizes, rows: int, width: int, convolving: Convolving) -> int:
    """The most bytes that are held at once for a strip of the output, beside the whole input and output.

    A patch has the rows of the strip and one more on each side. It is taken out of strips, then normalised or padded,
    and then convolved.
    """
    row = width * convolving.itemsize  # bytes of one channel
    result = rows * layer.out * row
    if layer.kind == "downsample":
        return _convolution_bytes(
            (2 * rows + 1) * layer.channels * (2 * row + 2 * convolving.itemsize), result, convolving
        )
    patch = (rows + 2) * layer.channels * row
    if layer.kind == "upsample":
        enlarged = (rows + 4) * layer.channels * row
        return max(enlarged + max(patch, enlarged // 4), _convolution_bytes(patch, result, convolving))
    first = _convolution_bytes(patch, result, convolving)
    if layer.kind == "convolution":
        return first + _STATISTICS * layer.channels
    # Of what is between the convolutions, the strip above is freed once the next one is there.
    second = result + _convolution_bytes((rows + 2) * layer.out * row, result, convolving)
    residual = rows * layer.channels * row
    statistics = _STATISTICS * max(layer.channels, layer.out)
    return statistics + max(first, second, 2 * result + residual + convolving.sums(residual, result))


def _convolution_bytes(patch: int, result: int, convolving: Convolving) -> int:
    return patch + max(patch, convolving.bytes_beside(patch, result))
