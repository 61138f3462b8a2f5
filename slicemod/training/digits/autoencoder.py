"""The first stage: a small variational autoencoder, trained once and frozen afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio

from slicemod.training.common.checkpoints import load_strictly, read_safetensors, write_safetensors
from slicemod.training.common.interruption import StopBetweenSteps
from slicemod.training.digits.digit_images import DigitBatch, DigitsDataModule
from slicemod.user_error import UserError

ENCODED_AT_ONCE, DECODED_AT_ONCE = 128, 64  # images


@dataclass(frozen=True)
class AutoencoderTraining:
    """How `fit` trains the autoencoder when its weights do not exist yet."""

    weights: str = "runs/digits/autoencoder.safetensors"
    """Where the trained weights lie; `fit` trains and writes them when the file is missing, else reads them."""
    max_steps: int = 300
    """Optimizer steps."""
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 2e-3
    """Peak of the one-cycle schedule of AdamW."""
    kl_weight: float = 1e-4
    """Weight of the Kullback-Leibler term, in nats an image, against the squared error summed over pixels."""
    seed: int = 0
    """Chooses the posterior's noise and the order of the batches."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"autoencoder_training.{name} must be above 0, got {getattr(self, name)}: give a positive number."
                )


class AutoencoderModule(pl.LightningModule):
    """Trains an ``AutoencoderKL`` by squared error and a small KL term (Rombach et al. 2022, arXiv:2112.10752, 3.1).

    Logs ``autoencoder/loss`` and, in validation, ``autoencoder/psnr`` in dB of reconstructions from the posterior
    mean, for images in [-1, 1].
    """

    def __init__(self, autoencoder: AutoencoderKL, training: AutoencoderTraining) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.recipe = training
        self.val_psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))

    def training_step(self, batch: DigitBatch, batch_idx: int) -> Tensor:
        """The error of the decoded images, with the KL term."""
        images = batch["image"]  # (B, 1, S, S)
        posterior = self.autoencoder.encode(images).latent_dist
        noise = torch.Generator(self.device).manual_seed(self.recipe.seed * 1_000_003 + self.global_step)
        restored = self.autoencoder.decode(posterior.sample(generator=noise)).sample
        kl = posterior.kl().mean() / images[0].numel()
        loss: Tensor = F.mse_loss(restored, images) + self.recipe.kl_weight * kl
        self.log("autoencoder/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: DigitBatch, batch_idx: int) -> None:
        """Logs the PSNR of decoded images."""
        latents = self.autoencoder.encode(batch["image"]).latent_dist.mode()
        self.val_psnr(self.autoencoder.decode(latents).sample, batch["image"])
        self.log("autoencoder/psnr", self.val_psnr, on_epoch=True)

    def configure_optimizers(self) -> pl.utilities.types.OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.autoencoder.parameters(), lr=self.recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.recipe.learning_rate, total_steps=self.recipe.max_steps, pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_autoencoder(autoencoder: AutoencoderKL, data: DigitsDataModule, training: AutoencoderTraining) -> float:
    """Trains ``autoencoder`` in place and writes its weights to ``training.weights``.

    The latents' scale, one over their standard deviation over the training images, becomes the autoencoder's
    ``scaling_factor`` (Rombach et al. 2022, G.2) and is kept in the file's metadata.

    Returns:
        PSNR in dB on the validation split.
    """
    module = AutoencoderModule(autoencoder, training)
    batches = DigitsDataModule(
        batch_size=training.batch_size,
        image_size=data.image_size,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
        shuffle_seed=training.seed,
    )
    trainer = pl.Trainer(
        max_steps=training.max_steps,
        limit_val_batches=0,  # validated once, below
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar(refresh_rate=10), StopBetweenSteps()],
    )
    autoencoder.requires_grad_(True)
    trainer.fit(module, datamodule=batches)
    trainer.limit_val_batches = 1.0
    measured = trainer.validate(module, datamodule=batches, verbose=False)
    psnr = float(measured[0]["autoencoder/psnr"])
    latents = encode_all(autoencoder, data.split("train").images)
    autoencoder.register_to_config(scaling_factor=1.0 / float(latents.std()))
    write_safetensors(
        training.weights,
        autoencoder.state_dict(),
        {"scaling_factor": repr(autoencoder.config.scaling_factor), "psnr": repr(psnr)},
    )
    return psnr


def load_autoencoder(autoencoder: AutoencoderKL, path: str | os.PathLike[str]) -> None:
    """Loads weights and ``scaling_factor`` that ``train_autoencoder`` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or of an autoencoder of another shape.
    """
    tensors, metadata = read_safetensors(path)
    load_strictly(autoencoder, tensors, path)
    if "scaling_factor" in metadata:
        autoencoder.register_to_config(scaling_factor=float(metadata["scaling_factor"]))


@torch.no_grad()
def encode_all(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means of all images, unscaled: (N, 1, S, S) to (N, c, S/f, S/f)."""
    return torch.cat([autoencoder.encode(part).latent_dist.mode() for part in torch.split(images, ENCODED_AT_ONCE)])


@torch.no_grad()
def decode_all(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images in [-1, 1] of all unscaled latents: (N, c, h, w) to (N, 1, f*h, f*w)."""
    images = torch.cat(
        [cast(Tensor, autoencoder.decode(part).sample) for part in torch.split(latents, DECODED_AT_ONCE)]
    )
    return images.clamp(-1, 1)
