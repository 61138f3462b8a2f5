"""Draws images from a trained model with its diffusers scheduler and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from slicemod.planning.whole_latents import resolution_step
from slicemod.training.common.denoiser import Conditioning, Denoiser
from slicemod.training.digits.latent_diffusion import LatentDiffusion
from slicemod.user_error import UserError


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    steps: int = 50
    """Denoising steps, at most the scheduler's training steps."""
    guidance: float = 2.0
    """Weight w of the label: the prediction is ``none + w * (label - none)``, so 1 is no guidance (Ho and Salimans
    2022, arXiv:2207.12598, whose w is one less)."""
    seed: int = 0
    """Of the noise, which does not depend on ``batch_size``."""
    batch_size: int = 64
    """Images denoised together."""
    refined_share: float = 0.2
    """Share of the steps that is run again at a resolution above the trained one."""


@torch.no_grad()
def sample_images(
    model: LatentDiffusion,
    labels: Tensor,
    sampling: Sampling | None = None,
    *,
    resolution: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Draws one image for each label.

    Above the trained resolution, images are drawn at the trained one, enlarged, noised partway and denoised again at
    the wanted one (SDEdit, Meng et al. 2022, arXiv:2108.01073): a UNet asked for the larger size at once fills it
    with parts of objects of the size it knows.

    Args:
        model: a trained model.
        labels: (B,) int64 classes.
        sampling: None takes the defaults.
        resolution: edge of the images in pixels, at least the trained one; None is the trained one.
        progress: whether to show a progress bar.

    Returns:
        (B, 1, resolution, resolution) float32 in [-1, 1], on the CPU.

    Raises:
        UserError: a label, the resolution or the number of steps is out of range.
    """
    how = sampling or Sampling()
    size = model.trained_resolution if resolution is None else resolution
    _require_valid(model, labels, size, how)
    again = round(how.refined_share * how.steps) if size > model.trained_resolution else 0
    edges = (model.trained_resolution // model.pixels_per_latent, size // model.pixels_per_latent)
    draw = torch.Generator().manual_seed(how.seed)
    channels = model.unet.config.in_channels
    noise, more = (torch.randn(len(labels), channels, edge, edge, generator=draw) for edge in edges)  # (B, c, h, w)
    groups = [torch.split(part, how.batch_size) for part in (noise, more, labels)]
    images = []
    with Progress(disable=not progress) as bar:
        task = bar.add_task("sampling", total=len(groups[0]) * (how.steps + again))
        for first, second, wanted in zip(*groups, strict=True):
            denoiser = _denoiser(model, wanted, how, lambda: bar.advance(task))
            drawn = model.decode(denoiser.run(first.to(model.device)))
            if again:
                enlarged = F.interpolate(drawn, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
                drawn = model.decode(denoiser.refine(model.encode(enlarged), second.to(model.device), again))
            images.append(drawn.cpu())
    return torch.cat(images)


def _denoiser(model: LatentDiffusion, labels: Tensor, how: Sampling, tick: Callable[[], None]) -> Denoiser:
    labels = labels.to(model.device)
    none = torch.full_like(labels, model.class_embedder.null_class)
    wanted, nothing = (Conditioning(model.class_embedder(part), {}) for part in (labels, none))
    return Denoiser(model.unet, model.scheduler, wanted, nothing, how.guidance, how.steps, tick)


def _require_valid(model: LatentDiffusion, labels: Tensor, resolution: int, how: Sampling) -> None:
    highest = model.class_embedder.num_classes - 1
    if labels.numel() == 0 or not (int(labels.min()) >= 0 and int(labels.max()) <= highest):
        wrong = sorted({int(label) for label in labels if not 0 <= int(label) <= highest})
        raise UserError(
            f"The class must be a whole number from 0 to {highest}, got {', '.join(map(str, wrong)) or 'none'}:"
            " choose one of the digits that the model was trained on."
        )
    unit = resolution_step(model.pixels_per_latent, model.unet.config)
    if resolution < model.trained_resolution or resolution % unit:
        raise UserError(
            f"The resolution must be at least {model.trained_resolution} pixels, the trained one, and a multiple of"
            f" {unit}, which the autoencoder and the UNet halve down to one, got {resolution}: use"
            f" {model.trained_resolution}, or 2 or 4 times it."
        )
    most = model.scheduler.config.num_train_timesteps
    if not 1 <= how.steps <= most:
        raise UserError(f"The number of steps must be from 1 to {most}, got {how.steps}: 20 to 50 are usual.")
