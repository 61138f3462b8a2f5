"""`slicemod fit` for Stable Diffusion: a folder of captioned images, and `--dry_run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser

from slicemod.planning.whole_latents import pixels_per_latent, resolution_step
from slicemod.printing import wide_console
from slicemod.training.common.lightning_cli import SlicemodCLI
from slicemod.training.stable_diffusion.captioned_folder import CaptionedFolder
from slicemod.training.stable_diffusion.dry_run import forecast, peak_table, plan_table
from slicemod.training.stable_diffusion.fully_sharded import FullySharded
from slicemod.training.stable_diffusion.lightning_module import StableDiffusion
from slicemod.user_error import UserError


class StableDiffusionCLI(SlicemodCLI):
    """Checks that the data fits the model."""

    example = "configs/sd15_lora.yaml"

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(StableDiffusion, CaptionedFolder, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--dry-run``."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--dry-run", action="store_true", help="Print the plans and the peak of each bucket; nothing is trained."
        )

    def before_instantiate_classes(self) -> None:
        """Checks the data's numbers before a model is read or fetched."""
        super().before_instantiate_classes()
        CaptionedFolder(**self._get(self.config, "data").as_dict())

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Builds the trainer; `fsdp` is the strategy that runs everywhere."""
        if self._get(self.config_init, "trainer").strategy == "fsdp":
            kwargs["strategy"] = FullySharded()
        return super().instantiate_trainer(**kwargs)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Every trained weight has to fit, and the frozen ones have to be those it was trained with."""
        self.model.require_checkpoint(checkpoint, path)

    def before_fit(self) -> None:
        """Checks sizes, images, checkpoint and folders."""
        self._require_matching_sizes()
        self.datamodule.find(progress=self.trainer.is_global_zero)
        if not self._is_dry_run:
            super().before_fit()

    def fit(self, **kwargs: Any) -> None:
        """Trains, or prints what training would take."""
        if not self._is_dry_run:
            super().fit(**kwargs)
            return
        console = wide_console()
        forecasts = forecast(self.model, self.datamodule, self.trainer)
        console.print(plan_table(forecasts))
        console.print(peak_table(forecasts))
        console.print("weights: with gradients that accumulate and an average's copy. Nothing was trained.")

    @property
    def _is_dry_run(self) -> bool:
        return bool(self.config_init["fit"]["dry_run"])

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
        unit = pixels_per_latent(self.model.pretrained.autoencoder_config())
        step = resolution_step(unit, self.model.unet.config)
        if self.datamodule.bucket_step % step:
            raise UserError(
                f"data.bucket_step must be a multiple of {step} pixels, which autoencoder and UNet halve down to whole"
                f" latents, got {self.datamodule.bucket_step}: use {step}."
            )
