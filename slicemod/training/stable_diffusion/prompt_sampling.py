"""Draws images of prompts from a fine-tuned Stable Diffusion model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from slicemod.planning.whole_latents import pixels_per_latent, resolution_step
from slicemod.training.common.denoiser import Denoiser
from slicemod.training.stable_diffusion.lightning_module import StableDiffusion
from slicemod.training.stable_diffusion.text_encoders import TextEmbeddings
from slicemod.user_error import UserError


class EncodedPrompt(NamedTuple):
    """A prompt's embeddings and those of what is not wanted, of one row each."""

    wanted: TextEmbeddings
    nothing: TextEmbeddings


def encode_prompts(
    model: StableDiffusion, prompts: Sequence[str], negative_prompt: str | None = None
) -> list[EncodedPrompt]:
    """Embeds prompts by the model's text encoders.

    Args:
        model: whose text encoders they are.
        prompts: what is drawn.
        negative_prompt: what is not; None is what stood for a dropped caption in training.
    """
    if negative_prompt is None:
        nothing = model.without_text(model.stages.encode_captions([""]))
    else:
        nothing = model.stages.encode_captions([negative_prompt])
    return [EncodedPrompt(model.stages.encode_captions([prompt]), nothing) for prompt in prompts]


def require_size(model: StableDiffusion, height: int, width: int) -> None:
    """Checks an image size.

    Raises:
        UserError: autoencoder and UNet cannot halve it down to whole latents.
    """
    step = resolution_step(pixels_per_latent(model.pretrained.autoencoder_config()), model.unet.config)
    if min(height, width) < step or height % step or width % step:
        raise UserError(
            f"The image size must be multiples of {step} pixels, which autoencoder and UNet halve down to whole"
            f" latents, got {height}x{width}: use {max(1, round(height / step)) * step}x"
            f"{max(1, round(width / step)) * step}."
        )


@dataclass(frozen=True)
class PromptSampling:
    """How images of prompts are drawn."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 7.0
    """Weight of the prompt; 1 is no guidance."""
    seed: int = 0
    """Of the noise of the first image; each image's is one more than the one before's."""
    scheduler: str | None = None
    """One of ``samplers.SAMPLERS``; None is the model's own."""


@torch.no_grad()
def draw_prompts(
    model: StableDiffusion, prompts: Sequence[EncodedPrompt], how: PromptSampling, *, progress: bool = True
) -> Tensor:
    """Draws one image for each prompt, one at a time, as diffusers' pipelines draw it from a generator of its seed.

    Args:
        model: on the device that it draws on.
        prompts: from ``encode_prompts``.
        how: size, steps, guidance, seed and scheduler.
        progress: whether to show a progress bar.

    Returns:
        (N, 3, height, width) float32 in [-1, 1], on the CPU.

    Raises:
        UserError: the size, the number of steps or the scheduler cannot be used.
    """
    scheduler = require_drawable(model, how)
    height, width = how.height, how.width
    unit = pixels_per_latent(model.pretrained.autoencoder_config())
    shape = (1, model.unet.config.in_channels, height // unit, width // unit)
    size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    training = model.unet.training
    model.unet.eval()
    latents = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("drawing", total=None)
        for place, (wanted, nothing) in enumerate(prompts):
            draw = torch.Generator().manual_seed(how.seed + place)
            noise = torch.randn(shape, generator=draw)
            denoiser = Denoiser(
                model.unet,
                scheduler,
                model.conditioning(wanted, size),
                model.conditioning(nothing, size),
                how.guidance,
                how.steps,
                lambda: bar.advance(task),
            )
            bar.update(task, total=len(prompts) * denoiser.calls)
            with model.frozen_autocast():
                latents.append(denoiser.run(noise.to(model.device), draw))
    model.unet.train(training)
    model.stages.to(model.device)
    images = model.stages.decode(torch.cat(latents))
    model.stages.to(torch.device("cpu"))
    return images


def require_drawable(model: StableDiffusion, how: PromptSampling) -> Any:
    """Checks size, steps and scheduler, and returns the scheduler.

    Raises:
        UserError: one of them cannot be used.
    """
    require_size(model, how.height, how.width)
    scheduler = model.sampling_scheduler(how.scheduler)
    _require_steps(scheduler, how.steps)
    return scheduler


def _require_steps(scheduler: Any, steps: int) -> None:
    most = int(scheduler.config.num_train_timesteps)
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(most)
    if float(probe.timesteps.max()) >= most:
        most -= 1  # a schedule with an offset would begin beyond the trained one
    if not 1 <= steps <= most:
        raise UserError(f"The number of steps must be from 1 to {most}, got {steps}: 20 to 50 are usual.")
