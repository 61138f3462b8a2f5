"""Fine-tunes the UNet of SD1.x, SD2.x or SDXL on cached latents and embeddings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from slicemod import SliceConfig, SwapReport, swap_attention
from slicemod.planning.unets import CLIP_TOKENS
from slicemod.planning.whole_latents import pixels_per_latent
from slicemod.training.common.agreed_budget import agree_on_budget
from slicemod.training.common.checkpoints import CheckpointError, read_checkpoint, require_matching
from slicemod.training.common.denoiser import Conditioning
from slicemod.training.common.last_checkpoint import last_checkpoint
from slicemod.training.common.mean_over_images import MeanOverImages
from slicemod.training.common.optimizers import build_optimizer
from slicemod.training.common.stop_signals import TrainingInterruptedError
from slicemod.training.common.trained_weights import LoraSettings, Trained, choose_trained, trained_names
from slicemod.training.stable_diffusion.captioned_folder import CaptionedFolder, LatentBatch
from slicemod.training.stable_diffusion.content_hash import module_digest
from slicemod.training.stable_diffusion.denoising_objective import Objective
from slicemod.training.stable_diffusion.frozen_stages import FrozenStages
from slicemod.training.stable_diffusion.fully_sharded import shard
from slicemod.training.stable_diffusion.nonfinite import NonFiniteError
from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.training.stable_diffusion.samplers import build_sampler
from slicemod.training.stable_diffusion.text_encoders import (
    CHUNK,
    TextEmbeddings,
    load_text_encoders,
    require_max_tokens,
    tell_of_cut,
)
from slicemod.training.stable_diffusion.unet_requirements import require_known_kind, require_matching_text
from slicemod.user_error import UserError

STORED = "slicemod_stable_diffusion"  # where a checkpoint keeps what rebuilds the model
WEIGHTS = ("state_dict", "current_model_state")  # the second is Lightning's, beside an average in the first
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Draw(NamedTuple):
    """What is random about one image: ``noise`` and ``posterior`` (1, c, h, w), ``timestep`` and ``dropped`` (1,)."""

    noise: Tensor
    posterior: Tensor
    timestep: Tensor
    dropped: Tensor


class StableDiffusion(pl.LightningModule):
    """Trains the UNet of a Stable Diffusion model; autoencoder and text encoders stay as they are.

    Checkpoints hold the trained weights alone. Noise, timesteps and dropped captions depend on ``seed`` and the image's
    number alone, so that a continued run draws what an uninterrupted one draws, with any size of batches, and several
    processes together draw what one draws. Dropout depends on the batch's first image.

    Logs ``train/loss``, and in validation ``val/loss``, the mean over fixed timesteps and noise, and ``val/loss_t<T>``
    for each of these timesteps.

    Args:
        source: a folder or hub id in diffusers' layout, or a ``.safetensors`` or ``.ckpt`` file of CompVis or sgm.
        config_source: folder or hub id with the configs and the vocabulary of a single file.
        trained: all weights of the UNet, those of its attention, or low-rank adapters.
        lora: of the adapters.
        objective: loss and noise.
        optimizer: given the parameters, makes the optimizer.
        lr_scheduler: given the optimizer, makes a schedule that steps once a training step.
        attention: how attention is sliced, of the UNet and of the autoencoder; None leaves them their own.
        block_checkpointing: recompute the UNet's blocks in the backward pass.
        compile: run the UNet under ``torch.compile(fullgraph=True)``; each bucket is compiled once.
        frozen_dtype: of the UNet's weights beside adapters; what is trained is float32.
        max_tokens: of a caption, a multiple of 75, which CLIP takes at once; what is longer is cut.
        seed: of noise, timesteps, dropped captions and the adapters' first values.
        val_timesteps: where the validation loss is measured.

    Raises:
        UserError: the settings do not go together, or the model cannot be read.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of users' configs
        self,
        source: str,
        config_source: str | None = None,
        trained: Trained = "lora",
        lora: LoraSettings = LoraSettings(),  # noqa: B008 - frozen
        objective: Objective = Objective(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        attention: SliceConfig | None = None,
        block_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002  (the name of the option, `--model.compile`)
        frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        max_tokens: int = CHUNK,
        seed: int = 0,
        val_timesteps: list[int] = [100, 300, 500, 700, 900],  # noqa: B006 - never changed
    ) -> None:
        super().__init__()
        self.pretrained = Pretrained(source, config_source)
        self.trained: Trained = trained
        self.lora = lora
        self.objective = objective
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.attention = attention
        self.frozen_dtype = frozen_dtype
        self.seed = seed
        self.val_timesteps = list(val_timesteps)
        if frozen_dtype != "float32" and trained != "lora":
            raise UserError(
                f"model.frozen_dtype: expected float32 where model.trained is {trained}, got {frozen_dtype}: weights"
                " that are trained are float32; use trainer.precision for the arithmetic."
            )
        require_max_tokens(max_tokens)
        self.max_tokens = max_tokens
        scheduler_config = self.pretrained.scheduler_config()
        require_known_kind(self.pretrained.unet_config(), self.pretrained.autoencoder_config(), scheduler_config)
        self.scheduler_changes = objective.scheduler_changes(scheduler_config)
        self.scheduler = self.pretrained.load_scheduler(**self.scheduler_changes)
        self.unet = self.pretrained.load_unet()
        self.zeroes_missing_text = self.is_sdxl and self.pretrained.zeroes_missing_text()
        steps = self.scheduler.config.num_train_timesteps
        if not all(0 <= timestep < steps for timestep in self.val_timesteps):
            raise UserError(f"model.val_timesteps must be from 0 to {steps - 1}, got {self.val_timesteps}.")
        # Of what the checkpoints leave out, so that a run does not continue beside other frozen weights.
        self.base_digest = None if trained == "full" else module_digest(self.unet)
        if frozen_dtype != "float32":
            torch.nn.Module.to(self.unet, DTYPES[frozen_dtype])  # diffusers' own warns of layers that it has not
        self.swap_report: SwapReport | None = None
        if attention is not None:
            self.swap_report = swap_attention(self.unet, attention)
        choose_trained(self.unet, trained, lora, seed=seed)
        self._trained_names = trained_names(self)
        self.strict_loading = trained == "full"  # what checkpoints leave out has its values already
        if block_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers gives it for inference; blocks are checkpointed in training alone
        self.compiled = compile
        if compile:
            self.unet.compile(fullgraph=True)  # in place: the state dict keeps its keys
        self.stages = FrozenStages(self._load_autoencoder, lambda: load_text_encoders(self.pretrained, max_tokens))
        self.val_losses = torch.nn.ModuleDict({str(timestep): MeanMetric() for timestep in self.val_timesteps})
        self._files: list[str] = []
        self._mean = MeanOverImages()

    def _load_autoencoder(self) -> Any:
        autoencoder = self.pretrained.load_autoencoder()
        if self.attention is not None and autoencoder.config.mid_block_add_attention:
            swap_attention(autoencoder, self.attention)
        return autoencoder

    def frozen_autocast(self, device: torch.device | None = None) -> AbstractContextManager[Any]:
        """Autocast to the dtype of the frozen weights, which inputs and adapters in float32 do not go with.

        Args:
            device: where it runs; None is the model's.
        """
        if self.frozen_dtype == "float32":
            return nullcontext()  # an autocast that is not enabled would end the trainer's
        return torch.autocast((device or self.device).type, DTYPES[self.frozen_dtype])

    @property
    def is_sdxl(self) -> bool:
        """The UNet looks at a summary of the caption and at image sizes besides."""
        return bool(self.unet.config.addition_embed_type == "text_time")

    @property
    def native_resolution(self) -> int:
        """Edge in pixels of the images that the UNet was made for."""
        return int(self.unet.config.sample_size) * pixels_per_latent(self.pretrained.autoencoder_config())

    @property
    def context_tokens(self) -> int:
        """Tokens that the cross-attention looks at, starts and ends among them."""
        return self.max_tokens // CHUNK * CLIP_TOKENS

    def without_text(self, empty: TextEmbeddings) -> TextEmbeddings:
        """What stands for a caption that is dropped and for no negative prompt.

        SDXL was trained with zeros there, which its ``force_zeros_for_empty_prompt`` says; the others with the empty
        caption.

        Args:
            empty: of the empty caption.
        """
        if not self.zeroes_missing_text:
            return empty
        return TextEmbeddings(*(None if part is None else torch.zeros_like(part) for part in empty))  # type: ignore[arg-type]

    def conditioning(self, text: TextEmbeddings, time_ids: Tensor) -> Conditioning:
        """What the UNet looks at, on the device of its weights.

        Args:
            text: ``context`` (B, tokens, d) and ``pooled`` (B, p) or None.
            time_ids: (B, 6), used by SDXL alone.

        Raises:
            UserError: the embeddings are not of the widths that this UNet looks at.
        """
        require_matching_text(self.unet.config, text)
        added: dict[str, Tensor] = {}
        if self.is_sdxl:
            assert text.pooled is not None  # its width was looked at
            added = {"text_embeds": text.pooled.to(self.device), "time_ids": time_ids.to(self.device)}
        return Conditioning(text.context.to(self.device), added)

    def sampling_scheduler(self, name: str | None = None) -> Any:
        """What draws by the schedule of the training.

        Args:
            name: one of ``samplers.SAMPLERS``; None is the model's own, or DDIM where that does not know the schedule.

        Raises:
            UserError: there is no such name, or it does not know the schedule.
        """
        return build_sampler(self.pretrained.scheduler_config(), self.scheduler_changes, name)

    # The loss

    def denoising_losses(self, batch: LatentBatch, timesteps: Tensor | None = None) -> Tensor:
        """Weighted squared error of each image's prediction, (B,) float32.

        Args:
            batch: from ``CaptionedFolder``.
            timesteps: (B,), with every caption kept; None draws them.
        """
        draws = [self._draw(number, batch["mean"].shape[1:]) for number in batch["numbers"]]
        noise, posterior = (
            torch.cat([getattr(draw, n) for draw in draws]).to(self.device) for n in ("noise", "posterior")
        )
        drawn, drop = (torch.cat([getattr(draw, n) for draw in draws]).to(self.device) for n in ("timestep", "dropped"))
        if timesteps is not None:
            drawn, drop = timesteps, torch.zeros_like(drop)
        drawn = drawn.to(self.device)
        latents = batch["mean"] + batch["std"] * posterior
        noisy = self.scheduler.add_noise(latents, noise, drawn)
        context, added = self.conditioning(self._dropped(batch, drop), batch["time_ids"])
        with self.frozen_autocast():
            predicted = self.unet(noisy, drawn, context, added_cond_kwargs=added).sample
        target = self.objective.target(self.scheduler, latents, noise, drawn)
        errors = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        return self.objective.weights(self.scheduler, drawn) * errors

    def _dropped(self, batch: LatentBatch, drop: Tensor) -> TextEmbeddings:
        """The captions' embeddings, and what stands for none where ``drop`` (B,) is true."""
        nothing = self.without_text(TextEmbeddings(batch["empty_context"], batch["empty_pooled"]))
        context = torch.where(drop[:, None, None], nothing.context, batch["context"])
        if batch["pooled"] is None or nothing.pooled is None:
            return TextEmbeddings(context, None)
        return TextEmbeddings(context, torch.where(drop[:, None], nothing.pooled, batch["pooled"]))

    def _draw(self, number: int, shape: torch.Size) -> Draw:
        """All that is random about an image, by its number: whatever other images come in its batch."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return Draw(
            self.objective.noise(torch.Size([1, *shape]), draw),
            torch.randn(1, *shape, generator=draw),
            torch.randint(self.scheduler.config.num_train_timesteps, (1,), generator=draw),
            torch.rand(1, generator=draw) < self.objective.caption_dropout,
        )

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """The denoising loss of a batch."""
        self._files = batch["files"]
        torch.manual_seed(self.seed * 1_000_003 + batch["numbers"][0])  # of dropout
        loss = self.denoising_losses(batch).mean()
        self._require_finite(loss.detach(), "loss")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["mean"]), sync_dist=True)
        return self._mean.weigh(loss, len(batch["mean"]))

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """Adds a batch to the losses at the timesteps of validation."""
        count = len(batch["mean"])
        for name, metric in self.val_losses.items():
            losses = self.denoising_losses(batch, torch.full((count,), int(name)))
            metric(losses.mean(), weight=count)
            self.log(f"val/loss_t{name}", cast(MeanMetric, metric), batch_size=count)

    def on_validation_epoch_end(self) -> None:
        """Logs the mean of these losses."""
        means = [cast(MeanMetric, metric).compute() for metric in self.val_losses.values()]
        self.log("val/loss", torch.stack(means).mean(), prog_bar=True, sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the gradient the mean over the step's images, and ends a run whose gradients are not finite."""
        self._mean.settle(self.parameters(), self.trainer.accumulate_grad_batches)
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # fp16's loss scaling skips the steps whose gradients overflow
        gradients = [p.grad for p in self.unet.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._require_finite(norm.full_tensor() if isinstance(norm, DTensor) else norm, "norm of the gradients")

    def _require_finite(self, value: Tensor, name: str) -> None:
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(name, float(value), self.global_step, self._files, last_checkpoint(self.trainer))

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Fills the cache of latents and embeddings, every process its share, once the text is known to fit the UNet.

        Raises:
            UserError: the embeddings are not of the widths that the UNet looks at.
        """
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, CaptionedFolder):
            self.stages.to(self.trainer.strategy.root_device)
            require_matching_text(self.unet.config, self.stages.encode_captions([""]))
            data.find(progress=self.trainer.is_global_zero)
            captions = sorted({image.caption for image in (*data.train_images, *data.val_images)})
            told = tell_of_cut(self.stages.text_encoders, captions, "captions")
            if told and self.trainer.is_global_zero:
                print(told, file=sys.stderr)
            try:
                data.fill_cache(
                    self.stages,
                    rank=self.trainer.global_rank,
                    world_size=self.trainer.world_size,
                    progress=self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None,
                )
            except TrainingInterruptedError as stop:
                stop.kept = f"Latents and embeddings cached so far are kept in {data.cache.folder} and not made again."
                raise
            self.stages.to(torch.device("cpu"))
            self.trainer.strategy.barrier("cache")

    def configure_model(self) -> None:
        """Shards the UNet where the strategy has a mesh of devices.

        Raises:
            UserError: the UNet is compiled.
        """
        if self.device_mesh is not None:
            if self.compiled:
                raise UserError(
                    "model.compile: expected false where weights are sharded, which are gathered outside of the"
                    " compiled graph, got true. Set it to false, or use trainer.strategy: ddp."
                )
            shard(self.unet, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Lets the processes agree on the budget of their attention."""
        agree_on_budget(self.unet, self.attention, self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and the schedule that the config names."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return build_optimizer(self.trainer, trained, self.make_optimizer, self.make_lr_scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what is not trained and adds what rebuilds the model, as plain values."""
        for key in WEIGHTS:
            if key in checkpoint:
                checkpoint[key] = {
                    name: value for name, value in checkpoint[key].items() if name in self._trained_names
                }
        checkpoint[STORED] = {
            "source": self.pretrained.source,
            "config_source": self.pretrained.config_source,
            "trained": self.trained,
            "lora": asdict(self.lora),
            "objective": asdict(self.objective),
            "attention": None if self.attention is None else self.attention.as_dict(),
            "frozen_dtype": self.frozen_dtype,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "val_timesteps": self.val_timesteps,
            "prediction_type": self.scheduler.config.prediction_type,
            "unet": json.loads(self.unet.to_json_string()),
            "base_digest": self.base_digest,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes an average's trained weights by those that are not: Lightning loads them strictly."""
        if all(key in checkpoint for key in WEIGHTS):
            own = {name: tensor for name, tensor in self.state_dict().items() if name not in self._trained_names}
            for key in WEIGHTS:
                checkpoint[key] = {**own, **checkpoint[key]}

    def require_checkpoint(self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
        """Checks that a checkpoint's weights belong into this model.

        Raises:
            CheckpointError: they were trained in another model, or in another part of it.
        """
        stored = stored_settings(checkpoint, path)
        if stored["trained"] != self.trained or stored["base_digest"] != self.base_digest:
            raise CheckpointError(
                f"{path} does not belong to this model: expected {self.trained} weights beside the frozen ones of"
                f" {self.pretrained.source}, got {stored['trained']} weights trained beside those of"
                f" {stored['source']}. Use the configuration that the checkpoint was trained with."
            )
        trained = {name: tensor for name, tensor in self.state_dict().items() if name in self._trained_names}
        for key in WEIGHTS:
            if key in checkpoint:
                require_matching(trained, checkpoint[key], path, type(self).__name__)


def stored_settings(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What rebuilds the model of a checkpoint.

    Raises:
        CheckpointError: the checkpoint does not hold it.
    """
    stored = checkpoint.get(STORED)
    if not isinstance(stored, dict) or "source" not in stored:
        raise CheckpointError(
            f"{path} is no checkpoint of a Stable Diffusion fine-tuning: expected `{STORED}` in it. Use a checkpoint"
            " that `slicemod fit` wrote."
        )
    for name, kind in _STORED_KINDS.items():
        if not isinstance(stored.get(name), kind):
            raise CheckpointError(
                f"{path} stores {name} that cannot be used: expected {kind.__name__}, got {stored.get(name)!r}. Use a"
                " checkpoint that `slicemod fit` wrote."
            )
    return stored


_STORED_KINDS = {"source": str, "trained": str, "lora": dict, "objective": dict, "frozen_dtype": str, "unet": dict}


def load_stable_diffusion(
    path: str | os.PathLike[str],
    *,
    source: str | None = None,
    frozen_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_tokens: int | None = None,
) -> StableDiffusion:
    """Rebuilds a fine-tuned model from its checkpoint and the model that it started from, in evaluation mode.

    Args:
        path: a checkpoint that `slicemod fit` wrote. Where weights were averaged, it is the average.
        source: where the model that it started from lies now; None is where it lay then.
        frozen_dtype: of the weights beside adapters, read from the source; None is that of the training.
        max_tokens: of a prompt; None is that of the training.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or does not belong to the source.
        UserError: the source cannot be read.
    """
    checkpoint = read_checkpoint(path)
    stored = stored_settings(checkpoint, path)
    try:
        settings: dict[str, Any] = {
            "trained": stored["trained"],
            "lora": LoraSettings(**stored["lora"]),
            "objective": Objective(**stored["objective"]),
            "attention": None if stored["attention"] is None else SliceConfig.of(stored["attention"]),
            "frozen_dtype": frozen_dtype or stored["frozen_dtype"],
            "max_tokens": stored.get("max_tokens", CHUNK) if max_tokens is None else max_tokens,
            "seed": stored["seed"],
            "val_timesteps": stored["val_timesteps"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes no model that can be built ({type(error).__name__}: {error}): expected the settings that"
            " `slicemod fit` writes. Use a checkpoint of this version."
        ) from error
    model = StableDiffusion(source or stored["source"], stored["config_source"], **settings)
    model.require_checkpoint(checkpoint, path)
    model.load_state_dict(checkpoint["state_dict"], strict=False)  # what is frozen has its values
    return model.eval()
