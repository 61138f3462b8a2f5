"""The second stage: a class-conditional UNet that denoises the latents of a frozen autoencoder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import diffusers
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from slicemod import SliceConfig, SwapReport, swap_attention
from slicemod.planning.whole_latents import pixels_per_latent
from slicemod.training.common.agreed_budget import agree_on_budget
from slicemod.training.common.checkpoints import CheckpointError, load_strictly, read_checkpoint
from slicemod.training.common.mean_over_images import MeanOverImages
from slicemod.training.common.optimizers import build_optimizer
from slicemod.training.common.trained_weights import LoraSettings, Trained, choose_trained
from slicemod.training.digits.autoencoder import decode_all, encode_all, load_autoencoder
from slicemod.training.digits.class_embedder import ClassEmbedder
from slicemod.training.digits.digit_images import DigitBatch
from slicemod.user_error import UserError

COMPONENTS = "slicemod_components"  # where a checkpoint keeps what rebuilds the model
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class LatentDiffusion(pl.LightningModule):
    """Trains ``unet`` and ``class_embedder`` on the latents of ``autoencoder``.

    The loss is the squared error of what ``scheduler.config.prediction_type`` names: the noise (Ho et al. 2020,
    arXiv:2006.11239, eq. 14), the velocity (Salimans and Ho 2022, arXiv:2202.00512, D) or the clean latents. Noise,
    timesteps and dropped labels depend on ``seed`` and the number of the batch's first image alone, so a continued run
    draws what an uninterrupted one draws.

    Logs ``train/loss``, and in validation ``val/loss`` and ``val/psnr`` (dB), ``val/ssim`` of images denoised in one
    step from a quarter of the way to noise.

    Args:
        unet: predicts from noisy latents (B, c, h, w), timesteps (B,) and context (B, 1, cross_attention_dim).
        autoencoder: frozen; its ``config.scaling_factor`` brings latents to unit variance.
        scheduler: a diffusers scheduler with ``add_noise``, such as ``DDIMScheduler``.
        class_embedder: label to context token.
        optimizer: given the parameters, makes the optimizer.
        lr_scheduler: given the optimizer, makes a schedule that steps once a training step.
        attention: how the UNet's attention is sliced; None leaves the UNet its own attention.
        compile: run the UNet under ``torch.compile(fullgraph=True)``, in training and in sampling.
        label_dropout: share of labels replaced by the null class, for classifier-free guidance.
        seed: of noise, timesteps and dropped labels.
        autoencoder_weights: safetensors file of the autoencoder; None keeps the weights ``autoencoder`` came with.
        init_from: checkpoint whose weights training starts from; every key must fit.
        trained: of the UNet: all weights, those of its attention, or low-rank adapters; ``class_embedder`` besides.
        lora: of the adapters.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of users' configs
        self,
        unet: UNet2DConditionModel,
        autoencoder: AutoencoderKL,
        scheduler: SchedulerMixin,
        class_embedder: ClassEmbedder,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        attention: SliceConfig | None = None,
        compile: bool = False,  # noqa: A002  (the name of the option, `--model.compile`)
        label_dropout: float = 0.1,
        seed: int = 0,
        autoencoder_weights: str | None = None,
        init_from: str | None = None,
        trained: Trained = "full",
        lora: LoraSettings = LoraSettings(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        _require_matching(unet, autoencoder, scheduler, class_embedder)
        if not 0 <= label_dropout < 1:
            raise UserError(
                f"model.label_dropout must be at least 0 and below 1, got {label_dropout}: give a share such as 0.1."
            )
        self.unet = unet
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scheduler = scheduler
        self.class_embedder = class_embedder
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.attention = attention
        self.label_dropout = label_dropout
        self.seed = seed
        self.autoencoder_weights = autoencoder_weights
        self.init_from = init_from
        self.trained: Trained = trained
        self.lora = lora
        self._adapted = False
        self.swap_report: SwapReport | None = None
        if attention is not None:
            self.swap_report = swap_attention(unet, attention)
        if compile:
            self.unet.compile(fullgraph=True)  # in place: the state dict keeps its keys
        self.val_loss = MeanMetric()
        self.val_psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))
        self.val_ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        self._train_latents: Tensor | None = None
        self._mean = MeanOverImages()

    # Sizes

    @property
    def pixels_per_latent(self) -> int:
        """Edge of the square of pixels that one latent stands for."""
        return pixels_per_latent(self.autoencoder.config)

    @property
    def trained_resolution(self) -> int:
        """Edge in pixels of the images that the UNet is trained on."""
        return cast(int, self.unet.config.sample_size) * self.pixels_per_latent

    # Latents and images

    def encode(self, images: Tensor) -> Tensor:
        """(N, 1, S, S) in [-1, 1] to latents of about unit variance, (N, c, S/f, S/f)."""
        return encode_all(self.autoencoder, images) * float(self.autoencoder.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, c, h, w) to images in [-1, 1], (N, 1, f*h, f*w)."""
        return decode_all(self.autoencoder, latents / float(self.autoencoder.config.scaling_factor))

    # The loss

    def diffusion_loss(self, latents: Tensor, labels: Tensor, noise_seed: int) -> Tensor:
        """Mean squared error of the UNet's prediction, a scalar.

        Args:
            latents: (B, c, h, w), as ``encode`` gives them.
            labels: (B,) int64.
            noise_seed: chooses timesteps, noise and dropped labels, the same on every device.
        """
        draw = torch.Generator().manual_seed(noise_seed)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, labels.shape, generator=draw).to(self.device)  # (B,)
        noise = torch.randn(latents.shape, generator=draw).to(latents)  # (B, c, h, w)
        drop = (torch.rand(labels.shape, generator=draw) < self.label_dropout).to(self.device)  # (B,)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted = self.unet(noisy, timesteps, self.class_embedder(labels, drop)).sample
        return F.mse_loss(predicted, self._target(latents, noise, timesteps))

    def batch_seed(self, batch: DigitBatch) -> int:
        """The ``noise_seed`` of a batch in training."""
        return self.seed * 1_000_003 + batch["number"]

    def training_step(self, batch: DigitBatch, batch_idx: int) -> Tensor:
        """The denoising loss of a batch."""
        assert self._train_latents is not None  # on_fit_start made them
        latents = self._train_latents[batch["index"]]
        loss = self.diffusion_loss(latents, batch["label"], self.batch_seed(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(latents))
        return self._mean.weigh(loss, len(latents))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the gradient the mean over the images of all batches of the step."""
        self._mean.settle(self.parameters(), self.trainer.accumulate_grad_batches)

    def validation_step(self, batch: DigitBatch, batch_idx: int) -> None:
        """Logs the denoising loss, and PSNR and SSIM of images that are denoised in one step."""
        latents, labels = self.encode(batch["image"]), batch["label"]
        count = len(labels)
        self.val_loss(self.diffusion_loss(latents, labels, noise_seed=batch_idx), weight=count)
        restored = self.decode(self._denoised_once(latents, labels, noise_seed=batch_idx))
        self.val_psnr(restored, batch["image"])
        self.val_ssim(restored, batch["image"])
        for name in ("loss", "psnr", "ssim"):
            self.log(f"val/{name}", getattr(self, f"val_{name}"), prog_bar=name == "loss", batch_size=count)

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Loads the autoencoder and, for fine-tuning, the base checkpoint."""
        if stage != "fit":
            return
        continued = self.init_from is not None or self.trainer.ckpt_path is not None
        if self.autoencoder_weights is not None and (Path(self.autoencoder_weights).exists() or not continued):
            load_autoencoder(self.autoencoder, self.autoencoder_weights)
        self.prepare_weights()

    def prepare_weights(self) -> None:
        """Loads the base checkpoint and chooses what is trained, the first time that it is called."""
        if self._adapted:
            return
        if self.init_from is not None:
            self.load_weights(self.init_from)
        self.adapt()

    def adapt(self) -> None:
        """Chooses what is trained; adapters come into the state dict by this."""
        choose_trained(self.unet, self.trained, self.lora, seed=self.seed)
        self._adapted = True

    def on_fit_start(self) -> None:
        """Encodes the training images once: the autoencoder is frozen, so each epoch would encode the same."""
        agree_on_budget(self.unet, self.attention, self.device)
        images = cast(Any, self.trainer).datamodule.split("train").images
        self._train_latents = self.encode(images.to(self.device))  # (N, c, h, w)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and the schedule that the config names."""
        parameters = [*self.unet.parameters(), *self.class_embedder.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return build_optimizer(self.trainer, trained, self.make_optimizer, self.make_lr_scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the model: plain values, so that ``weights_only=True`` reads them."""
        checkpoint[COMPONENTS] = {
            "unet": json.loads(self.unet.to_json_string()),
            "autoencoder": json.loads(self.autoencoder.to_json_string()),
            "scheduler": json.loads(self.scheduler.to_json_string()),
            "class_embedder": {"num_classes": self.class_embedder.num_classes, "dim": self.class_embedder.dim},
            "attention": None if self.attention is None else self.attention.as_dict(),
            "trained": self.trained,
            "lora": asdict(self.lora),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the scale of the latents that the checkpoint's weights were trained with."""
        config = checkpoint[COMPONENTS]["autoencoder"]
        self.autoencoder.register_to_config(scaling_factor=config["scaling_factor"])

    # Weights

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Loads the weights of a checkpoint, every key of it.

        Raises:
            CheckpointError: the file is missing, damaged or unsafe, or one key or shape differs.
        """
        checkpoint = read_checkpoint(path)
        stored_components(checkpoint, path)
        load_strictly(self, checkpoint["state_dict"], path)
        self.on_load_checkpoint(checkpoint)

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return latents
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * noise - sigma * latents

    def _denoised_once(self, latents: Tensor, labels: Tensor, noise_seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(noise_seed)
        timesteps = torch.full_like(labels, self.scheduler.config.num_train_timesteps // 4)
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted: Tensor = self.unet(noisy, timesteps, self.class_embedder(labels)).sample
        signal, sigma = self._signal_and_noise(timesteps)
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return predicted
        clean: Tensor = (
            (noisy - sigma * predicted) / signal if kind == "epsilon" else signal * noisy - sigma * predicted
        )
        return clean

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.scheduler.alphas_cumprod.to(self.device)[timesteps].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()


def load_latent_diffusion(
    path: str | os.PathLike[str],
    *,
    attention: SliceConfig | None,
    compile: bool = False,  # noqa: A002
) -> LatentDiffusion:
    """Rebuilds a trained model from its checkpoint alone, in evaluation mode.

    Args:
        path: a checkpoint that `slicemod fit` wrote.
        attention: the slicing to run with; None runs the UNet's own attention. ``checkpoint_attention`` gives the
            one it was trained with.
        compile: run the UNet under ``torch.compile(fullgraph=True)``.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or does not describe such a model.
    """
    checkpoint = read_checkpoint(path)
    parts = stored_components(checkpoint, path)
    try:
        model = LatentDiffusion(
            UNet2DConditionModel.from_config(parts["unet"]),
            AutoencoderKL.from_config(parts["autoencoder"]),
            _scheduler(parts["scheduler"]),
            ClassEmbedder(**parts["class_embedder"]),
            attention=attention,
            compile=compile,
            trained=parts["trained"],
            lora=LoraSettings(**parts["lora"]),
        )
        model.adapt()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes no model that can be built ({type(error).__name__}: {error}): expected the components"
            " that `slicemod fit` writes. Use a checkpoint of this version."
        ) from error
    load_strictly(model, checkpoint["state_dict"], path)
    return model.eval()


def checkpoint_attention(path: str | os.PathLike[str]) -> SliceConfig | None:
    """The slicing that a checkpoint was trained with; None for the UNet's own attention."""
    stored = stored_components(read_checkpoint(path), path)["attention"]
    try:
        return None if stored is None else SliceConfig.of(stored)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} stores an attention block that cannot be used: {error} Use a checkpoint of this version."
        ) from error


def stored_components(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What rebuilds the model of a checkpoint.

    Raises:
        CheckpointError: the checkpoint does not hold it.
    """
    parts = checkpoint.get(COMPONENTS)
    expected = {"unet", "autoencoder", "scheduler", "class_embedder", "attention", "trained", "lora"}
    if not isinstance(parts, dict) or set(parts) != expected:
        raise CheckpointError(
            f"{path} is no checkpoint of `slicemod fit`: expected `{COMPONENTS}` with {', '.join(sorted(expected))},"
            f" got {'none' if parts is None else 'something else'}. Use a checkpoint that `slicemod fit` wrote."
        )
    return parts


def _scheduler(config: dict[str, Any]) -> SchedulerMixin:
    kind = getattr(diffusers, str(config["_class_name"]), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{config['_class_name']} is no scheduler of diffusers")
    return cast(Any, kind).from_config(config)


def _require_matching(
    unet: UNet2DConditionModel,
    autoencoder: AutoencoderKL,
    scheduler: SchedulerMixin,
    class_embedder: ClassEmbedder,
) -> None:
    if unet.config.in_channels != autoencoder.config.latent_channels:
        raise UserError(
            "model.unet.init_args.in_channels must equal model.autoencoder.init_args.latent_channels,"
            f" {autoencoder.config.latent_channels}, got {unet.config.in_channels}: change one of the two."
        )
    if unet.config.cross_attention_dim != class_embedder.dim:
        raise UserError(
            "model.unet.init_args.cross_attention_dim must equal model.class_embedder.init_args.dim,"
            f" {class_embedder.dim}, got {unet.config.cross_attention_dim}: change one of the two."
        )
    kind = scheduler.config.get("prediction_type")
    if kind not in PREDICTION_TYPES or not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"model.scheduler must predict one of {', '.join(PREDICTION_TYPES)} and have alphas_cumprod, got"
            f" {type(scheduler).__name__} with prediction_type {kind!r}: use for example diffusers.DDIMScheduler."
        )
