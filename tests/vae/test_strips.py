"""An image in strips gives its rows, and frees what is no longer needed."""

from __future__ import annotations

import pytest
import torch

from slicemod.vae.strips import Strips, bounds


def strips() -> tuple[torch.Tensor, Strips]:
    image = torch.randn(1, 3, 17, 5)
    cut = Strips()
    for part in torch.split(image, [5, 1, 11], dim=2):
        cut.append(part.clone())
    return image, cut


@pytest.mark.parametrize(("start", "stop"), [(0, 17), (4, 7), (5, 6), (7, 13), (16, 17)])
def test_rows_are_those_of_the_image(start: int, stop: int) -> None:
    image, cut = strips()
    assert cut.height == 17
    assert torch.equal(cut.rows(start, stop), image[:, :, start:stop])


def test_strips_above_a_row_are_freed_and_the_others_keep_their_place() -> None:
    image, cut = strips()
    cut.free_above(5)
    assert [strip.shape[2] for strip in cut.strips] == [1, 11]
    cut.free_above(16)
    assert [strip.shape[2] for strip in cut.strips] == [11]
    assert torch.equal(cut.rows(7, 13), image[:, :, 7:13])
    cut.free_above(17)
    assert cut.strips == []


def test_bounds_cover_every_row_once() -> None:
    assert list(bounds(17, 7)) == [(0, 7), (7, 14), (14, 17)]
