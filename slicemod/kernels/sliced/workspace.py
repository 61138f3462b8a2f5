"""One allocation for all buffers of a kernel, divided into tiles. New buffers would cost more than the arithmetic."""

import math

import torch
from torch import Tensor


class Workspace:
    """One buffer, divided into named tiles of `sizes` elements. A turn takes the part of a tile that it needs."""

    def __init__(self, sizes: dict[str, int], like: Tensor, dtype: torch.dtype) -> None:
        buffer = torch.empty(sum(sizes.values()), dtype=dtype, device=like.device)
        self._tiles = dict(zip(sizes, torch.split(buffer, list(sizes.values())), strict=True))

    def __contains__(self, name: str) -> bool:
        return name in self._tiles

    def tile(self, name: str, *sizes: int) -> Tensor:
        """The first elements of the tile `name`, in the shape `sizes`. All of its elements if a size is -1."""
        tile = self._tiles[name]
        return (tile if -1 in sizes else tile[: math.prod(sizes)]).view(sizes)

    def narrow_tile(self, name: str, dtype: torch.dtype, *sizes: int) -> Tensor:
        """The first bytes of the tile `name` as elements of another dtype, in the shape `sizes`."""
        return self._tiles[name].view(dtype)[: math.prod(sizes)].view(sizes)
