"""PNG files of samples and of loss curves; each appears whole under its name or not at all."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from slicemod.whole_file import replacing

GAP = 2  # black pixels between tiles


def save_tiles(images: Tensor, path: str | os.PathLike[str], columns: int | None = None) -> None:
    """Writes images (N, 1 or 3, H, W) in [-1, 1] side by side, row by row; about a square without ``columns``."""
    wide = columns or math.ceil(math.sqrt(len(images)))
    high = math.ceil(len(images) / wide)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()  # (N, H, W, 1 or 3)
    height, width, channels = pixels.shape[1:]
    canvas = np.zeros((high * (height + GAP) - GAP, wide * (width + GAP) - GAP, channels), dtype=np.uint8)
    for place, tile in enumerate(pixels):
        top, left = place // wide * (height + GAP), place % wide * (width + GAP)
        canvas[top : top + height, left : left + width] = tile
    with replacing(path) as temporary:
        Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(temporary, format="PNG")


def save_digit_grid(panels: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes one labelled panel for each title, a row for each digit.

    Args:
        panels: title to images (10, C, 1, H, W) in [-1, 1], C samples of each digit.
        path: the PNG file.
    """
    columns = next(iter(panels.values())).shape[1]
    figure = Figure(figsize=(len(panels) * columns * 0.42 + 0.4, 10 * 0.42 + 0.5), dpi=160, layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        digits, count, _, height, width = images.shape
        tiles = images[:, :, 0].permute(0, 2, 1, 3).reshape(digits * height, count * width)
        axes.imshow(tiles.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([height * (digit + 0.5) for digit in range(digits)], labels=range(digits))
        axes.tick_params(length=0)
        axes.hlines([height * digit - 0.5 for digit in range(1, digits)], -0.5, count * width - 0.5, "0.35", lw=0.5)
        axes.vlines([width * place - 0.5 for place in range(1, count)], -0.5, digits * height - 0.5, "0.35", lw=0.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def save_loss_curve(runs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Draws training losses over steps, one run after the other, from Lightning's CSV logs.

    Args:
        runs: name of a run to its ``metrics.csv``, in the order in which they ran.
        path: the PNG file.
    """
    figure = Figure(figsize=(7, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    start = 0
    for number, (name, log) in enumerate(runs.items()):
        color = f"C{number}"
        train = read_metric(log, "train/loss")
        steps = [start + step for step, _ in train]
        axes.plot(steps, [loss for _, loss in train], color=color, alpha=0.25, lw=0.8)
        axes.plot(steps, _smoothed([loss for _, loss in train]), color=color, lw=1.6, label=f"{name}, training")
        val = read_metric(log, "val/loss")
        axes.plot([start + step for step, _ in val], [loss for _, loss in val], "o", color=color, ms=4,
                  mec="white", label=f"{name}, validation")  # fmt: skip
        start = steps[-1] + 1
    axes.set(xlabel="step", ylabel="squared error of the predicted noise", yscale="log")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def read_metric(log: str | os.PathLike[str], name: str) -> list[tuple[int, float]]:
    """(step, value) pairs of one metric in a ``metrics.csv`` of Lightning."""
    with Path(log).open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def _smoothed(values: list[float]) -> list[float]:
    smooth, mean = [], values[0]
    for value in values:
        mean = 0.85 * mean + 0.15 * value
        smooth.append(mean)
    return smooth
