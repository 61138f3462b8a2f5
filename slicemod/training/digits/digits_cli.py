"""`slicemod fit` for the digits: also trains the autoencoder where its weights do not exist yet."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from diffusers import AutoencoderKL
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from slicemod.training.common.checkpoints import load_strictly
from slicemod.training.common.lightning_cli import SlicemodCLI
from slicemod.training.digits.autoencoder import AutoencoderTraining, load_autoencoder, train_autoencoder
from slicemod.training.digits.digit_images import DigitsDataModule
from slicemod.training.digits.latent_diffusion import LatentDiffusion, stored_components
from slicemod.user_error import UserError


class DigitsCLI(SlicemodCLI):
    """Adds the top-level block ``autoencoder_training``."""

    example = "configs/digits.yaml"

    def __init__(self, arguments: Sequence[str]) -> None:
        _widen_tuples(AutoencoderKL)
        super().__init__(LatentDiffusion, DigitsDataModule, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the block and hands its file to the model."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(AutoencoderTraining, "autoencoder_training")
        parser.link_arguments("autoencoder_training.weights", "model.autoencoder_weights")

    def check_checkpoint(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Every weight has to fit."""
        stored_components(checkpoint, path)
        load_strictly(self.model, checkpoint["state_dict"], path)

    def before_fit(self) -> None:
        """Checks everything that can be wrong, then trains the autoencoder if its weights do not exist yet."""
        self._require_matching_sizes()
        options: Namespace = self.config_init["fit"]
        continued = options.get("ckpt_path") is not None or self.model.init_from is not None
        self.model.prepare_weights()
        training: AutoencoderTraining = options["autoencoder_training"]
        trained = Path(training.weights).exists()
        if trained:
            load_autoencoder(self.model.autoencoder, training.weights)
        super().before_fit()
        if not continued and not trained:
            print(f"{training.weights} does not exist yet: training the autoencoder first.")
            psnr = train_autoencoder(self.model.autoencoder, self.datamodule, training)
            self.model.autoencoder.eval().requires_grad_(False)
            print(f"autoencoder PSNR {psnr:.2f} dB on the validation split: {training.weights}")

    def before_validate(self) -> None:
        """Checks sizes and the checkpoint."""
        self._require_matching_sizes()
        self.model.prepare_weights()
        super().before_validate()

    def folders(self) -> list[str | Path | None]:
        """The autoencoder's besides."""
        own = [Path(self.config_init["fit"]["autoencoder_training"].weights).parent] if self.subcommand == "fit" else []
        return super().folders() + list(own)

    def _require_matching_sizes(self) -> None:
        if self.datamodule.image_size != self.model.trained_resolution:
            raise UserError(
                f"data.image_size must be {self.model.trained_resolution}, model.unet.init_args.sample_size"
                f" ({self.model.unet.config.sample_size} latents) times the autoencoder's"
                f" {self.model.pixels_per_latent} pixels a latent, got {self.datamodule.image_size}:"
                " change one of the two."
            )


def _widen_tuples(component: type) -> None:
    """Corrects annotations such as ``tuple[int]``, one element, to the ``tuple[int, ...]`` that diffusers means.

    jsonargparse checks YAML against annotations, and diffusers writes those of ``AutoencoderKL`` the short way.
    """
    annotations = inspect.unwrap(component.__init__).__annotations__  # type: ignore[misc]
    for name, annotation in annotations.items():
        if get_origin(annotation) is tuple and len(get_args(annotation)) == 1:
            annotations[name] = tuple[get_args(annotation)[0], ...]  # type: ignore[misc]
