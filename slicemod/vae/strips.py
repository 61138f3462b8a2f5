"""`Strips`: an image as a list of strips of rows, which are freed once nobody needs them any more."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Strips:
    """An image `(1, C, H, W)` in strips `(1, C, h, W)`, from top to bottom."""

    def __init__(self) -> None:
        self.strips: list[Tensor] = []  # those that are still held
        self.first_row = 0  # of the first strip that is still held
        self.height = 0  # of the whole image

    @classmethod
    def of(cls, image: Tensor) -> Strips:
        """The image as one strip."""
        strips = cls()
        strips.append(image)
        return strips

    def append(self, strip: Tensor) -> None:
        """Add a strip at the bottom."""
        self.strips.append(strip)
        self.height += strip.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        """`(1, C, stop - start, W)`: these rows, which have to lie in the image. A copy if several strips have them."""
        parts, row = [], self.first_row
        for strip in self.strips:
            end = row + strip.shape[2]
            if row < stop and end > start:
                parts.append(strip[:, :, max(start - row, 0) : min(stop, end) - row])
            row = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def free_above(self, row: int) -> None:
        """Free the strips that lie above this row as a whole."""
        while self.strips and self.first_row + self.strips[0].shape[2] <= row:
            self.first_row += self.strips.pop(0).shape[2]

    def whole(self) -> Tensor:
        """The whole image. The strips are freed."""
        image = self.rows(0, self.height)
        self.free_above(self.height)
        return image


def bounds(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of strips of at most so many rows."""
    return ((start, min(start + rows, height)) for start in range(0, height, rows))
