"""How large the tiles are that one program computes at a time, by architecture and head size."""

from __future__ import annotations

from typing import Literal, NamedTuple

from slicemod.rounding import ceil_div

Architecture = str | None  # "sm_90", "gfx942"; None where Triton interprets on the CPU
Pass = Literal["forward", "query", "keys"]

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


class _Line(NamedTuple):
    """The tiles of one kernel for the architectures whose names begin like this, up to this head size."""

    which: Pass
    architectures: tuple[str, ...]
    widest: int
    tiles: Tiles


_AMD, _ANY, _WIDE = ("gfx",), ("",), 2**30
_WARP_GROUPS = ("sm_9", "sm_10")  # four warps multiply together there, 64 rows or more at a time

# All lines were chosen by what Triton 3.8 and 3.9 make of them for sm_80, sm_86, sm_90, sm_100 and gfx942: registers
# that suffice, shared memory that every card has. None was timed, as none ran on a GPU. The first line that fits holds.
_HALF = (
    _Line("forward", _AMD, 64, Tiles(128, 64, 64, 128, 4, 2)),
    _Line("forward", _AMD, 128, Tiles(64, 64, 128, 128, 4, 2)),
    _Line("forward", _AMD, 256, Tiles(64, 32, 256, 256, 8, 1)),
    _Line("forward", _ANY, 64, Tiles(128, 64, 64, 128, 8, 3)),
    _Line("forward", _ANY, 128, Tiles(64, 64, 128, 128, 8, 2)),
    _Line("forward", _ANY, 256, Tiles(64, 32, 256, 256, 8, 2)),
    _Line("forward", _ANY, _WIDE, Tiles(64, 64, 64, 128, 8, 2)),
    _Line("query", _AMD, 64, Tiles(64, 64, 64, 128, 8, 2)),
    _Line("query", _AMD, 128, Tiles(64, 32, 128, 128, 8, 1)),
    _Line("query", _AMD, _WIDE, Tiles(64, 32, 64, 128, 8, 1)),
    _Line("query", _WARP_GROUPS, 64, Tiles(64, 64, 64, 128, 8, 2)),
    _Line("query", _ANY, 64, Tiles(64, 32, 64, 128, 8, 2)),
    _Line("query", _ANY, 128, Tiles(64, 32, 128, 128, 8, 2)),
    _Line("query", _ANY, _WIDE, Tiles(64, 32, 64, 128, 8, 2)),
    _Line("keys", _AMD, _WIDE, Tiles(32, 64, 64, 128, 8, 1)),
    _Line("keys", _WARP_GROUPS, 64, Tiles(32, 64, 64, 128, 8, 2)),
    _Line("keys", _WARP_GROUPS, 128, Tiles(32, 64, 128, 128, 8, 2)),
    _Line("keys", _WARP_GROUPS, _WIDE, Tiles(32, 64, 64, 128, 8, 2)),
    _Line("keys", _ANY, 128, Tiles(64, 32, 128, 128, 8, 2)),
    _Line("keys", _ANY, _WIDE, Tiles(64, 32, 64, 128, 8, 2)),
)
_FLOAT = (  # NVIDIA's tensor cores would round it, so products are unrolled, and take many registers
    _Line("forward", _ANY, _WIDE, Tiles(32, 32, 64, 128, 4, 2)),
    _Line("query", _ANY, 64, Tiles(32, 32, 64, 128, 4, 2)),
    _Line("query", _AMD, _WIDE, Tiles(32, 32, 64, 64, 4, 1)),
    _Line("query", _ANY, _WIDE, Tiles(32, 32, 32, 64, 8, 1)),
    _Line("keys", _ANY, 64, Tiles(32, 32, 64, 128, 8, 2)),
    _Line("keys", _AMD, _WIDE, Tiles(32, 32, 64, 64, 4, 1)),
    _Line("keys", _ANY, _WIDE, Tiles(32, 32, 32, 32, 8, 1)),
)
_INTERPRETED = Tiles(64, 64, 64, 128, 4, 2)  # its time is the number of operations, whatever their size


def tiles_of(which: Pass, architecture: Architecture, itemsize: int, width: int) -> Tiles:
    """The tiles of a pass, for elements of `itemsize` bytes and heads of up to `width` channels.

    >>> tiles_of("forward", "sm_86", 2, 40).rows
    128
    """
    if architecture is None:
        return _INTERPRETED
    lines = _HALF if itemsize == 2 else _FLOAT
    return next(
        line.tiles
        for line in lines
        if line.which == which and width <= line.widest and architecture.startswith(line.architectures)
    )


def chunks_of(size: int, most: int) -> tuple[int, int]:
    """The width of a chunk of `size` columns, a power of two up to `most`, and how many chunks there are.

    >>> chunks_of(40, 128), chunks_of(160, 64)
    ((64, 1), (64, 3))
    """
    width = min(max(_LEAST, 1 << (size - 1).bit_length()), most)
    return width, ceil_div(size, width)
