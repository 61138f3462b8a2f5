"""How often a classifier, trained on real digits, reads a generated digit as the digit asked for."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor

from slicemod.training.digits.digit_images import PIXEL_LEVELS, DigitSplit


class DigitReader:
    """A support vector machine on 8x8 pixels, fitted to real training digits alone.

    Args:
        train: the real digits that it learns from.
    """

    def __init__(self, train: DigitSplit) -> None:
        # gamma is the one of scikit-learn's digits example, for pixels from 0 to 16
        self._classifier = SVC(gamma=0.001, C=10.0).fit(_pixels(train.images), train.labels.numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of ``images`` (N, 1, S, S) in [-1, 1], S a multiple of 8, read as ``labels`` (N,)."""
        return float(self._classifier.score(_pixels(images), labels.numpy()))


def _pixels(images: Tensor) -> NDArray[np.float32]:
    small = F.adaptive_avg_pool2d(images, 8)  # (N, 1, 8, 8): the resolution that the digits were scanned at
    pixels: NDArray[np.float32] = ((small + 1) / 2 * PIXEL_LEVELS).flatten(1).cpu().numpy()
    return pixels
