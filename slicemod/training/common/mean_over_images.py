"""The gradient of a step as the mean over its images, where Lightning's is the mean over its batches."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class MeanOverImages:
    """Weighs the batches of an accumulated step by their images.

    Lightning divides each batch's loss by ``accumulate_grad_batches``, also where an epoch ends after fewer batches and
    where a batch is smaller than the others; one image there has another weight than elsewhere, or the whole step is
    shorter.
    """

    def __init__(self) -> None:
        self._images = 0  # of the batches that are accumulated now
        self._unit = 1  # images of the first of them

    def weigh(self, loss: Tensor, images: int) -> Tensor:
        """A batch's loss as the training step should return it.

        Args:
            loss: mean over the batch's images.
            images: how many these are.
        """
        if not self._images:
            self._unit = images
        self._images += images
        return loss if images == self._unit else loss * (images / self._unit)

    def settle(self, parameters: Iterable[nn.Parameter], accumulated: int) -> None:
        """Makes the gradients the mean over the images since the last call; changes them where they are not yet.

        Args:
            parameters: whose gradients have accumulated.
            accumulated: what Lightning divided each loss by.
        """
        factor = accumulated * self._unit / self._images
        self._images = 0
        if factor == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
