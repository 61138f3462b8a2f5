"""Draws images of prompts from a fine-tuned Stable Diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from slicemod.training.denoiser import Denoiser
from slicemod.training.frozen_stages import pixels_per_latent, resolution_step
from slicemod.training.stable_diffusion import StableDiffusion
from slicemod.training.text_encoders import TextEmbeddings
from slicemod.user_error import UserError


class EncodedPrompt(NamedTuple):
    """A prompt's embeddings and the empty one's, of one row each."""

    wanted: TextEmbeddings
    nothing: TextEmbeddings


def encode_prompts(model: StableDiffusion, prompts: Sequence[str]) -> list[EncodedPrompt]:
    """Embeds prompts by the model's text encoders."""
    nothing = model.stages.encode_captions([""])
    return [EncodedPrompt(model.stages.encode_captions([prompt]), nothing) for prompt in prompts]


def require_size(model: StableDiffusion, height: int, width: int) -> None:
    """Checks an image size.

    Raises:
        UserError: autoencoder and UNet cannot halve it down to whole latents.
    """
    step = resolution_step(model.pretrained.autoencoder_config(), model.unet.config)
    if min(height, width) < step or height % step or width % step:
        raise UserError(
            f"The image size must be multiples of {step} pixels, which autoencoder and UNet halve down to whole"
            f" latents, got {height}x{width}: use {max(1, round(height / step)) * step}x"
            f"{max(1, round(width / step)) * step}."
        )


@torch.no_grad()
def draw_prompts(
    model: StableDiffusion,
    prompts: Sequence[EncodedPrompt],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    seed: int,
    progress: bool = True,
) -> Tensor:
    """Draws one image for each prompt, one at a time; the noise of image i depends on ``seed + i`` alone.

    Args:
        model: on the device that it draws on.
        prompts: from ``encode_prompts``.
        height: in pixels.
        width: in pixels.
        steps: of the DDIM schedule.
        guidance: weight of the prompt; 1 is no guidance.
        seed: of the noise.
        progress: whether to show a progress bar.

    Returns:
        (N, 3, height, width) float32 in [-1, 1], on the CPU.

    Raises:
        UserError: the size or the number of steps cannot be used.
    """
    require_size(model, height, width)
    most = model.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise UserError(f"The number of steps must be from 1 to {most}, got {steps}: 20 to 50 are usual.")
    unit = pixels_per_latent(model.pretrained.autoencoder_config())
    shape = (1, model.unet.config.in_channels, height // unit, width // unit)
    size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    training = model.unet.training
    model.unet.eval()
    latents = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("drawing", total=len(prompts) * steps)
        for place, (wanted, nothing) in enumerate(prompts):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + place))
            denoiser = Denoiser(
                model.unet,
                model.sampling_scheduler(),
                model.conditioning(wanted, size),
                model.conditioning(nothing, size),
                guidance,
                steps,
                lambda: bar.advance(task),
            )
            with model.frozen_autocast():
                latents.append(denoiser.run(noise.to(model.device), steps))
    model.unet.train(training)
    model.stages.to(model.device)
    images = model.stages.decode(torch.cat(latents))
    model.stages.to(torch.device("cpu"))
    return images
