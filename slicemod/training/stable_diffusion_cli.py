"""`slicemod fit` for Stable Diffusion: a folder of captioned images, and `--dry_run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slicemod.training.captioned_folder import CaptionedFolder
from slicemod.training.frozen_stages import resolution_step
from slicemod.training.lightning_cli import SlicemodCLI
from slicemod.training.stable_diffusion import StableDiffusion
from slicemod.user_error import UserError


class StableDiffusionCLI(SlicemodCLI):
    """Checks that the data fits the model."""

    example = "configs/sd15_lora.yaml"

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(StableDiffusion, CaptionedFolder, arguments)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Every trained weight has to fit, and the frozen ones have to be those it was trained with."""
        self.model.require_checkpoint(checkpoint, path)

    def before_fit(self) -> None:
        """Checks sizes, images, checkpoint and folders."""
        self._require_matching_sizes()
        self.datamodule.find(progress=self.trainer.is_global_zero)
        super().before_fit()

    def before_validate(self) -> None:
        """Checks that there is something to validate on."""
        self._require_matching_sizes()
        if not self.datamodule.val_count:
            raise UserError("data.val_count must be at least 1 to validate, got 0: hold some images out.")
        super().before_validate()

    def folders(self) -> list[str | Path | None]:
        """The cache's besides."""
        return [*super().folders(), self.datamodule.cache.folder]

    def _require_matching_sizes(self) -> None:
        step = resolution_step(self.model.pretrained.autoencoder_config(), self.model.unet.config)
        if self.datamodule.bucket_step % step:
            raise UserError(
                f"data.bucket_step must be a multiple of {step} pixels, which autoencoder and UNet halve down to whole"
                f" latents, got {self.datamodule.bucket_step}: use {step}."
            )
