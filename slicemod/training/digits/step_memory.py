"""What one training step of the same model allocates with several implementations of attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from slicemod import SliceConfig, SlicePlan, SwapReport, restore_attention, swap_attention
from slicemod.bench.memory import peak_memory
from slicemod.training.digits.latent_diffusion import LatentDiffusion


class StepMemory(NamedTuple):
    """One measurement of a training step.

    Attributes:
        attention: how it was computed.
        resolution: edge of the image in pixels.
        batch: images.
        peak_bytes: what the step allocated at most.
        seconds: the time of one other such step.
        plans: of every attention layer by its path; none where the attention is not slicemod's.
    """

    attention: str
    resolution: int
    batch: int
    peak_bytes: int
    seconds: float
    plans: dict[str, SlicePlan]


def measure_training_steps(
    model: LatentDiffusion, slicing: SliceConfig, resolution: int, batch: int
) -> list[StepMemory]:
    """Runs training steps on random latents: materialised scores, SDPA, ``slicing``, and that by the sliced kernel.

    Args:
        model: left with its own attention and without gradients; its weights do not change (the rate is zero).
        slicing: of the third measurement; the fourth has the same with ``kernel="math"``.
        resolution: edge of the images that the latents stand for, in pixels.
        batch: images a step.
    """

    def slice_by(slicing: SliceConfig) -> Callable[[], SwapReport]:
        return lambda: swap_attention(model.unet, slicing)

    budget = f"{slicing.budget}, {slicing.policy}"
    variants: dict[str, Callable[[], SwapReport | None]] = {
        "plain (diffusers AttnProcessor)": lambda: model.unet.set_attn_processor(AttnProcessor()),
        "SDPA (diffusers AttnProcessor2_0)": lambda: model.unet.set_attn_processor(AttnProcessor2_0()),
        f"slicemod ({budget})": slice_by(slicing),
        f"slicemod ({budget}, kernel math)": slice_by(replace(slicing, kernel="math")),
    }
    step = _training_step(model, resolution, batch)
    step()  # makes the optimizer's state, which would count for the first variant alone
    measured = []
    for name, use in variants.items():
        report = use()
        peak = peak_memory(step)
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        plans = {} if report is None else report.attention_plans
        measured.append(StepMemory(name, resolution, batch, peak, seconds, plans))
    restore_attention(model.unet)
    model.zero_grad(set_to_none=True)
    return measured


def _training_step(model: LatentDiffusion, resolution: int, batch: int) -> Callable[[], None]:
    edge = resolution // model.pixels_per_latent
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, model.unet.config.in_channels, edge, edge, generator=draw)  # (B, c, h, w)
    labels = torch.arange(batch) % model.class_embedder.num_classes  # (B,)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(model.diffusion_loss(latents, labels, noise_seed=0))
        optimizer.step()

    return step
