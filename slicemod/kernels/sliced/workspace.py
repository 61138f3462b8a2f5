"""One allocation for all the buffers of a kernel, carved into tiles: fresh buffers cost more than the arithmetic."""

import math

import torch
from torch import Tensor


class Workspace:
    """Tiles of `sizes` elements each; a turn of the loop takes the part of a tile that it fills."""

    def __init__(self, sizes: dict[str, int], like: Tensor, dtype: torch.dtype) -> None:
        buffer = torch.empty(sum(sizes.values()), dtype=dtype, device=like.device)
        self._tiles = dict(zip(sizes, torch.split(buffer, list(sizes.values())), strict=True))

    def __contains__(self, name: str) -> bool:
        return name in self._tiles

    def tile(self, name: str, *sizes: int) -> Tensor:
        """The first elements of the tile `name`, as `sizes`; all of them where a size is -1."""
        tile = self._tiles[name]
        return (tile if -1 in sizes else tile[: math.prod(sizes)]).view(sizes)
