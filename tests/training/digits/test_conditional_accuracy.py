from __future__ import annotations

import torch

from slicemod.training.digits.conditional_accuracy import DigitReader
from slicemod.training.digits.digit_images import digit_splits


def test_the_reader_reads_digits_that_it_never_saw_at_any_resolution() -> None:
    splits = digit_splits()
    reader = DigitReader(splits["train"])
    assert reader.accuracy(*splits["test"]) > 0.97
    assert reader.accuracy(*digit_splits(image_size=64)["test"]) > 0.97


def test_the_reader_does_not_agree_by_chance() -> None:
    splits = digit_splits()
    reader = DigitReader(splits["train"])
    labels = splits["test"].labels
    assert reader.accuracy(splits["test"].images, (labels + 1) % 10) < 0.05
    assert reader.accuracy(torch.full((50, 1, 32, 32), -1.0), torch.arange(50) % 10) <= 0.1
