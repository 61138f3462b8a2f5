"""Draws the same prompts from the same seeds in every validation, to see what the training does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from slicemod.training.common.pictures import save_tiles
from slicemod.training.stable_diffusion.captioned_folder import CaptionedFolder
from slicemod.training.stable_diffusion.lightning_module import StableDiffusion
from slicemod.training.stable_diffusion.prompt_sampling import (
    EncodedPrompt,
    PromptSampling,
    draw_prompts,
    encode_prompts,
    require_size,
)
from slicemod.training.stable_diffusion.text_encoders import tell_of_cut
from slicemod.user_error import UserError


class SampleImages(pl.Callback):
    """Writes ``<folder>/step<N>.png`` and logs the images to TensorBoard, at the end of each validation.

    Where weights are averaged, it is the average that draws, as it is the average that is validated. Every process
    draws, since sharded weights are gathered from all of them.

    Args:
        prompts: one image each.
        folder: of the PNG files; None is `samples` in the run's folder, ``trainer.default_root_dir``.
        seed: of the noise, one more for each prompt.
        steps: of denoising.
        guidance: weight of the prompt; 1 is no guidance.
        height: in pixels; None is the data's resolution.
        width: in pixels; None is the data's resolution.
        negative_prompt: what is not drawn; None is what stands for dropped captions.
    """

    def __init__(
        self,
        prompts: list[str],
        folder: str | None = None,
        seed: int = 0,
        steps: int = 30,
        guidance: float = 7.0,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        if not prompts:
            raise UserError("SampleImages.prompts must hold a prompt, got none: name one, or leave SampleImages out.")
        self.prompts = prompts
        self.folder = None if folder is None else Path(folder)
        self.seed = seed
        self.steps = steps
        self.guidance = guidance
        self.height = height
        self.width = width
        self.negative_prompt = negative_prompt
        self._encoded: list[EncodedPrompt] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Encodes the prompts once."""
        self.folder = self.folder or Path(trainer.default_root_dir) / "samples"
        model, data = require_stable_diffusion(trainer, pl_module, "SampleImages")
        self.height, self.width = self.height or data.resolution, self.width or data.resolution
        require_size(model, self.height, self.width)
        told = tell_of_cut(
            model.stages.text_encoders, [*self.prompts, *filter(None, [self.negative_prompt])], "prompts"
        )
        if told and trainer.is_global_zero:
            print(told, file=sys.stderr)
        self._encoded = encode_prompts(model, self.prompts, self.negative_prompt)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Draws and logs the images."""
        # The last batch and not the epoch's end: an average of the weights is taken out again there.
        if not is_last_validation_batch(trainer, batch_idx):
            return
        model = require_stable_diffusion(trainer, pl_module, "SampleImages")[0]
        assert self.height is not None  # setup filled them in
        assert self.width is not None
        images = draw_prompts(
            model,
            self._encoded,
            PromptSampling(self.height, self.width, self.steps, self.guidance, self.seed),
            progress=False,
        )
        if trainer.is_global_zero:
            self._log(trainer, images)

    def _log(self, trainer: pl.Trainer, images: Tensor) -> None:
        assert self.folder is not None  # setup chose it
        save_tiles(images, self.folder / f"step{trainer.global_step}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for prompt, image in zip(self.prompts, images, strict=True):
                    logger.experiment.add_image(f"samples/{prompt}", (image + 1) / 2, trainer.global_step)


def require_stable_diffusion(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str
) -> tuple[StableDiffusion, CaptionedFolder]:
    """Model and data of a run.

    Raises:
        UserError: callback ``name`` does not go with them, or nothing is validated.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(pl_module, StableDiffusion) or not isinstance(data, CaptionedFolder):
        raise UserError(
            f"{name} goes with StableDiffusion and CaptionedFolder, got {type(pl_module).__name__} and"
            f" {type(data).__name__}: leave it out of trainer.callbacks."
        )
    if not data.val_count:
        raise UserError(f"{name} works in validation: data.val_count must be at least 1, got 0. Hold an image out.")
    return pl_module, data


def is_last_validation_batch(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation ends with this batch; the check before training does not count."""
    return not trainer.sanity_checking and batch_idx + 1 == sum(map(int, trainer.num_val_batches))
