"""The 1,797 handwritten digits that ship inside scikit-learn, as images for a diffusion model."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from slicemod.training.common.resumable_batches import PlannedBatch, ResumableBatches
from slicemod.user_error import UserError

SplitName = Literal["train", "val", "test"]
NUM_CLASSES = 10
PIXEL_LEVELS = 16  # scikit-learn's digits are 8x8 integers from 0 to 16


class DigitSplit(NamedTuple):
    """One split: ``images`` (N, 1, S, S) float32 in [-1, 1] and ``labels`` (N,) int64."""

    images: Tensor
    labels: Tensor


class DigitBatch(TypedDict):
    """``image`` (B, 1, S, S), ``label`` (B,) and ``index`` (B,): the images' places in their split.

    ``number`` is the first image's, from the first epoch on, and no other batch's.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    number: int


def digit_splits(
    image_size: int = 32, val_fraction: float = 0.1, test_fraction: float = 0.1, split_seed: int = 0
) -> dict[SplitName, DigitSplit]:
    """Loads the digits, upsamples them bicubically and splits them, stratified by digit.

    Args:
        image_size: edge S of the square images, in pixels.
        val_fraction: share of all digits that goes to validation.
        test_fraction: share of all digits that is kept for testing.
        split_seed: the same seed gives the same three splits.
    """
    from sklearn.datasets import load_digits  # seconds, which `slicemod fit --help` need not take
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / PIXEL_LEVELS
    images = F.interpolate(images, size=(image_size, image_size), mode="bicubic", align_corners=False)
    images = images.clamp(0, 1) * 2 - 1  # bicubic overshoots beside strong edges
    targets = torch.as_tensor(labels, dtype=torch.int64)
    rest, test = train_test_split(
        range(len(targets)), test_size=test_fraction, stratify=targets, random_state=split_seed
    )
    train, val = train_test_split(
        rest, test_size=val_fraction / (1 - test_fraction), stratify=targets[rest], random_state=split_seed
    )
    chosen: dict[SplitName, list[int]] = {"train": train, "val": val, "test": test}
    return {name: DigitSplit(images[rows], targets[rows]) for name, rows in chosen.items()}


class DigitBatches(ResumableBatches[DigitBatch]):
    """Iterates over a split in batches.

    Args:
        split: what to iterate over.
        batch_size: images a batch; the last, smaller batch of a shuffled epoch is left out.
        shuffle_seed: None keeps the order of the split and every image of it.
    """

    def __init__(self, split: DigitSplit, batch_size: int, shuffle_seed: int | None = None) -> None:
        self.split = split
        whole = batch_size if shuffle_seed is not None else 1
        super().__init__([range(len(split.labels))], batch_size, shuffle_seed, multiple=whole)

    def load(self, planned: PlannedBatch) -> DigitBatch:
        """The images and labels at these places."""
        index = torch.tensor(planned.images)
        images, labels = self.split
        return {"image": images[index], "label": labels[index], "index": index, "number": planned.numbers[0]}


class DigitsDataModule(pl.LightningDataModule):
    """The digits of scikit-learn at ``image_size`` pixels, values in [-1, 1], in a fixed stratified split.

    Args:
        batch_size: images a batch.
        image_size: edge of the square images, in pixels.
        val_fraction: share of the 1,797 digits used for validation.
        test_fraction: share of the 1,797 digits that training never sees.
        split_seed: chooses which digits go to which split.
        shuffle_seed: chooses the order of the training batches.
        left_out: digits that are in no split.
    """

    def __init__(
        self,
        batch_size: int = 64,
        image_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        shuffle_seed: int = 0,
        left_out: list[int] = [],  # noqa: B006 - never changed
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("image_size", image_size)):
            if size < 1:
                raise UserError(f"data.{name} must be at least 1, got {size}: give a positive whole number.")
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise UserError(
                "data.val_fraction and data.test_fraction must be above 0 and leave digits to train on (a sum below"
                f" 1), got {val_fraction} and {test_fraction}: give smaller shares."
            )
        self.batch_size = batch_size
        self.image_size = image_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        if wrong := [digit for digit in left_out if digit not in range(NUM_CLASSES)]:
            raise UserError(f"data.left_out must hold digits from 0 to 9, got {wrong}: correct them.")
        self.shuffle_seed = shuffle_seed
        self.left_out = list(left_out)
        self._splits: dict[SplitName, DigitSplit] | None = None

    def split(self, name: SplitName) -> DigitSplit:
        """One of the splits ``train``, ``val`` and ``test``."""
        if self._splits is None:
            splits = digit_splits(self.image_size, self.val_fraction, self.test_fraction, self.split_seed)
            absent = torch.tensor(self.left_out, dtype=torch.int64)
            kept = {name: ~torch.isin(split.labels, absent) for name, split in splits.items()}
            self._splits = {
                name: DigitSplit(split.images[kept[name]], split.labels[kept[name]]) for name, split in splits.items()
            }
        return self._splits[name]

    def train_dataloader(self) -> DigitBatches:
        """The training digits, shuffled anew each epoch."""
        split = self.split("train")
        if len(split.labels) < self.batch_size:
            raise UserError(
                f"data.batch_size must be at most {len(split.labels)}, the number of training digits,"
                f" got {self.batch_size}: give a smaller batch."
            )
        return DigitBatches(split, self.batch_size, self.shuffle_seed)

    def val_dataloader(self) -> DigitBatches:
        """The validation digits, in a fixed order."""
        return DigitBatches(self.split("val"), self.batch_size)
