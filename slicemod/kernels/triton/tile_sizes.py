"""How large the tiles are that one program computes at a time."""

from __future__ import annotations

from typing import NamedTuple

from slicemod.rounding import ceil_div

Card = str | None  # "sm_90", "gfx942"; None where Triton interprets on the CPU

_LEAST = 16  # columns of the smallest product of a tensor core


class Tiles(NamedTuple):
    """Tile sizes of one kernel, and how it is compiled.

    Attributes:
        rows: rows of scores.
        keys: keys of scores.
        most_width: the most channels that are multiplied at a time.
        most_out: the most columns of a result that one program computes.
        warps: groups of 32 threads (64 on AMD) of a program.
        stages: loads that are under way at a time.
    """

    rows: int
    keys: int
    most_width: int
    most_out: int
    warps: int
    stages: int


# Chosen by what compilers made of them, not by time: none was run on a GPU.
_HALF = Tiles(64, 64, 64, 128, 8, 2)
_FLOAT = Tiles(32, 32, 64, 128, 4, 2)
_INTERPRETED = Tiles(64, 64, 64, 128, 4, 2)  # whose time is that of the number of operations, whatever their size


def forward_tiles(card: Card, itemsize: int, head_dim: int, value_dim: int) -> Tiles:
    """The tiles of the forward pass for elements of `itemsize` bytes."""
    if card is None:
        return _INTERPRETED
    return _HALF if itemsize == 2 else _FLOAT


def backward_tiles(card: Card, itemsize: int, head_dim: int, value_dim: int) -> Tiles:
    """The tiles of the backward pass for elements of `itemsize` bytes."""
    return forward_tiles(card, itemsize, head_dim, value_dim)


def chunks_of(size: int, most: int) -> tuple[int, int]:
    """The width of a chunk of `size` columns, a power of two up to `most`, and how many chunks there are.

    >>> chunks_of(40, 128), chunks_of(160, 64)
    ((64, 1), (64, 3))
    """
    width = min(max(_LEAST, 1 << (size - 1).bit_length()), most)
    return width, ceil_div(size, width)
