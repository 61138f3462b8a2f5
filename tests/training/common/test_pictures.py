from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slicemod.training.common.pictures import GAP, read_metric, save_digit_grid, save_loss_curve, save_tiles


def test_tiles_lie_row_by_row(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 3, 7)
    save_tiles(images, tmp_path / "tiles.png", columns=2)
    with Image.open(tmp_path / "tiles.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 * 3 + 2 * GAP, 2 * 7 + GAP)
    corners = [pixels[row * (3 + GAP), column * (7 + GAP)] for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))]
    assert [int(value) for value in corners] == [0, 64, 128, 191, 255]


def test_a_digit_grid_has_a_panel_for_each_title(tmp_path: Path) -> None:
    samples = torch.rand(10, 3, 1, 8, 8)
    save_digit_grid({"base": samples}, tmp_path / "one.png")
    save_digit_grid({"base": samples, "fine-tuned": samples}, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as first, Image.open(tmp_path / "two.png") as second:
        one, two = first.size, second.size
    assert two[0] > 1.5 * one[0]
    assert two[1] == one[1]


def test_a_loss_curve_is_read_from_csv_logs(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,train/loss,val/loss\n0,0.9,\n1,0.5,\n1,,0.6\n")
    assert read_metric(log, "train/loss") == [(0, 0.9), (1, 0.5)]
    assert read_metric(log, "val/loss") == [(1, 0.6)]
    save_loss_curve({"base": log, "fine-tuned": log}, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("name", ["missing", "val/psnr"])
def test_a_metric_that_was_never_logged_is_empty(tmp_path: Path, name: str) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,train/loss,val/psnr\n0,0.9,\n")
    assert read_metric(log, name) == []
