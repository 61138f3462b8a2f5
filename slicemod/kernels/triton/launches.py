"""Starts the kernels: makes their records from tensors, and grids of as many programs as there are tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicemod.kernels.attention_operators import AttentionCall
from slicemod.kernels.triton.device.forward import forward_kernel
from slicemod.kernels.triton.device.key_value_gradients import key_value_gradients_kernel
from slicemod.kernels.triton.device.mask_gradient import mask_gradient_kernel
from slicemod.kernels.triton.device.query_gradient import query_gradient_kernel
from slicemod.kernels.triton.device.row_products import row_products_kernel
from slicemod.kernels.triton.records import Factors, MaskSums, Matrix, Settings, Sizes
from slicemod.kernels.triton.tile_sizes import Architecture, Pass, Tiles, chunks_of, tiles_of
from slicemod.rounding import ceil_div

_MOST_BYTES_AT_ONCE = 16  # that a thread of a GPU reads
_LOG2_E = math.log2(math.e)


class Call(AttentionCall):
    """One attention call, as the kernels are told it. They can read its tensors."""

    __slots__ = ()

    @property
    def head_dim(self) -> int:
        """Channels of query and key."""
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        """Channels of value."""
        return self.value.shape[3]

    def tiles(self, which: Pass, architecture: Architecture) -> Tiles:
        """The tiles of a pass on this architecture."""
        return tiles_of(which, architecture, self.query.element_size(), max(self.head_dim, self.value_dim))

    def row_blocks(self, tiles: Tiles) -> int:
        """Blocks of rows in all heads."""
        return ceil_div(self.query.shape[2], tiles.rows) * self.query.shape[0] * self.query.shape[1]

    def key_blocks(self, tiles: Tiles) -> int:
        """Blocks of keys in all heads that have their own."""
        return ceil_div(self.key.shape[2], tiles.keys) * self.key.shape[0] * self.key.shape[1]

    @property
    def sizes(self) -> Sizes:
        """Its sizes."""
        _, heads, queries, _ = self.query.shape
        return Sizes(heads, heads // self.key.shape[1], queries, self.key.shape[2])

    @property
    def factors(self) -> Factors:
        """Its numbers. An additive mask is added to scaled scores, all else to scores that are scaled afterwards."""
        added = self.mask is not None and self.mask.dtype != torch.bool
        kept = 1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1 else 0.0
        return Factors(self.scale, _LOG2_E if added else self.scale * _LOG2_E, float(self.dropout_p), kept)

    @property
    def mask_kind(self) -> str:
        """As `Settings.mask` names it."""
        return "none" if self.mask is None else "bool" if self.mask.dtype == torch.bool else "additive"

    @property
    def mask_matrix(self) -> Matrix | None:
        """The mask, which has no strides where it is broadcast."""
        if self.mask is None:
            return None
        strides = (0 if size == 1 else step for size, step in zip(self.mask.shape, self.mask.stride(), strict=True))
        return Matrix(self.mask.view(torch.uint8) if self.mask.dtype == torch.bool else self.mask, *strides)

    def settings(self, tiles: Tiles, unit: int, out: int) -> Settings:
        """What kernels of this call are compiled for, where a result has `out` columns."""
        return Settings(
            tiles.rows,
            tiles.keys,
            *chunks_of(self.head_dim, tiles.most_width),
            *chunks_of(self.value_dim, tiles.most_width),
            chunks_of(out, tiles.most_out)[0],
            self.head_dim,
            self.value_dim,
            self.mask_kind,
            self.is_causal,
            self.dropout_p > 0,
            unit,
            self.query.is_cpu,  # where Triton interprets
        )


class Launch(NamedTuple):
    """One kernel, and what it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    tiles: Tiles

    @property
    def options(self) -> dict[str, Any]:
        """How it is compiled. A product and a sum are one instruction, which Triton 3.10 no longer does by default."""
        return {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages, "enable_fp_fusion": True}


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Starts the kernels, one after the other, on this device."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.kernel[launch.grid](*launch.arguments, **launch.options)


def forward_launch(call: Call, output: Tensor, sums: Tensor | None, architecture: Architecture) -> Launch:
    """Writes the output `(B, H, N, Dv)`, and the log-sum-exp of each row into `sums`, `(B, H, N)` float32."""
    tiles = call.tiles("forward", architecture)
    unit = _unit(call.query, call.key, call.value, output)
    settings = call.settings(tiles, unit, call.value_dim)
    query, key, value, out = (_matrix(tensor, unit) for tensor in (call.query, call.key, call.value, output))
    grid = call.row_blocks(tiles), ceil_div(call.value_dim, settings.out_width)
    arguments = query, key, value, call.mask_matrix, out, sums, call.seed, call.factors, call.sizes, settings
    return Launch(forward_kernel, grid, arguments, tiles)


class BackwardCall(NamedTuple):
    """What the backward pass is given besides the call.

    Attributes:
        grad_output: the gradient of the output.
        output: the output.
        sums: the log-sum-exp of each row.
        gradients: where those of query, key, value and mask are written; None for those that are not wanted.
    """

    grad_output: Tensor
    output: Tensor
    sums: Tensor
    gradients: Sequence[Tensor | None]


def backward_launches(call: Call, given: BackwardCall, architecture: Architecture) -> Iterator[Launch]:
    """Writes the gradients."""
    query_gradient, key_gradient, value_gradient, mask_gradient = given.gradients
    tensors = [call.query, call.key, call.value, given.grad_output, given.output, *given.gradients[:3]]
    unit = _unit(*(tensor for tensor in tensors if tensor is not None))
    matrices = (_matrix(tensor, unit) for tensor in (call.query, call.key, call.value))
    grad, products = _matrix(given.grad_output, unit), torch.empty_like(given.sums)
    known = *matrices, call.mask_matrix, grad, given.sums, products, call.seed
    rest = call.factors, call.sizes
    tiles = call.tiles("query", architecture)
    if query_gradient is not None or key_gradient is not None or mask_gradient is not None:
        settings = call.settings(tiles, unit, call.value_dim)
        rows = _matrix(given.output, unit), grad, products, call.sizes, settings
        yield Launch(row_products_kernel, (call.row_blocks(tiles),), rows, tiles)
    if query_gradient is not None:
        settings = call.settings(tiles, unit, call.head_dim)
        grid = call.row_blocks(tiles), ceil_div(call.head_dim, settings.out_width)
        yield Launch(query_gradient_kernel, grid, (*known, _matrix(query_gradient, unit), *rest, settings), tiles)
    if mask_gradient is not None and mask_gradient.shape[3] == 1:
        mask_gradient.zero_()
    elif mask_gradient is not None:
        yield _mask_launch(call, known, mask_gradient, tiles, unit)
    tiles = call.tiles("keys", architecture)
    if key_gradient is not None or value_gradient is not None:
        widths = 0 if key_gradient is None else call.head_dim, 0 if value_gradient is None else call.value_dim
        settings = call.settings(tiles, unit, max(widths))
        grid = call.key_blocks(tiles), ceil_div(max(widths), settings.out_width)
        both = (None if tensor is None else _matrix(tensor, unit) for tensor in (key_gradient, value_gradient))
        yield Launch(key_value_gradients_kernel, grid, (*known, *both, *rest, settings), tiles)


def _mask_launch(call: Call, known: tuple[Any, ...], gradient: Tensor, tiles: Tiles, unit: int) -> Launch:
    sizes = call.sizes
    items, heads, rows, _ = gradient.shape
    all_rows = rows == 1 and sizes.queries > 1
    row_tiles = 1 if all_rows else ceil_div(sizes.queries, tiles.rows)
    shared = MaskSums(call.query.shape[0] // items, sizes.heads // heads, heads)
    settings = call.settings(tiles, unit, 1)
    arguments = *known, _matrix(gradient, 1), shared, call.factors, sizes, all_rows, settings
    grid = (items * heads * row_tiles * ceil_div(sizes.keys, tiles.keys),)
    return Launch(mask_gradient_kernel, grid, arguments, tiles)


def _unit(*tensors: Tensor) -> int:
    """As many elements as a thread reads at once, if all strides of items, heads and rows are multiples; else 1."""
    unit = _MOST_BYTES_AT_ONCE // tensors[0].element_size()
    return unit if all(step % unit == 0 for tensor in tensors for step in tensor.stride()[:3]) else 1


def _matrix(tensor: Tensor, unit: int) -> Matrix:
    item, head, row, column = tensor.stride()
    return Matrix(tensor, item // unit, head // unit, row // unit, column)
