"""What a planned step needs to know of a model: how to build it without memory, and how a step runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch


class StepInputs(NamedTuple):
    """What the inputs of a step are made for.

    Attributes:
        dtype: of latents and text.
        batch: items.
        pixels: edge of the square image.
        frames: of the video; 1 for an image.
    """

    dtype: torch.dtype
    batch: int
    pixels: int
    frames: int = 1

    def empty(self, *size: int) -> torch.Tensor:
        """A tensor `(batch, *size)` without memory."""
        return torch.empty((self.batch, *size), device="meta", dtype=self.dtype)

    def numbers(self) -> torch.Tensor:
        """A whole number for each item, `(batch,)`, without memory."""
        return torch.empty(self.batch, device="meta", dtype=torch.long)


class StepSource(Protocol):
    """A model with a step that can be planned: a UNet, a transformer, a text encoder, or one half of an autoencoder."""

    @property
    def latent_pixels(self) -> int:
        """The edge, in pixels of the image, of the square that one latent pixel stands for."""

    @property
    def resolution_step(self) -> int:
        """The edge of an image has to be a multiple of this."""

    @property
    def frames(self) -> int:
        """Of a video; 1 for an image."""

    @property
    def most_pixels(self) -> int:
        """The largest edge that the model takes."""

    @property
    def own_pixels(self) -> int | None:
        """The edge of the images that it was trained on, if its config tells."""

    @property
    def full_upcasts(self) -> bool | None:
        """Whether full attention has its scores in float32. None: nobody runs this model with full attention."""

    @property
    def guidance_batch(self) -> int:
        """Items of a call for one image with guidance: 2, or 1 where the pipeline makes two calls or none is needed."""

    @property
    def latents_name(self) -> str:
        """The name of the input that the prediction has the shape of."""

    def model(self, dtype: torch.dtype) -> Any:
        """The model on the device "meta".

        Raises:
            UserError: its config builds none.
        """

    def inputs(self, model: Any, dtype: torch.dtype, batch: int, pixels: int) -> Mapping[str, Any]:
        """Keyword arguments of one call.

        Raises:
            UserError: the model needs an input that is not known.
        """

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """One call; returns the prediction."""
