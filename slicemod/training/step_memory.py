"""What one training step of the same model allocates with three implementations of attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from slicemod import SliceConfig, SwapReport, restore_attention, swap_attention
from slicemod.bench.memory import peak_memory
from slicemod.training.latent_diffusion import LatentDiffusion


class StepMemory(NamedTuple):
    """One measurement: ``peak_bytes`` allocated during a training step, and ``seconds`` of one other such step."""

    attention: str
    resolution: int
    batch: int
    peak_bytes: int
    seconds: float


def measure_training_steps(
    model: LatentDiffusion, slicing: SliceConfig, resolution: int, batch: int
) -> tuple[list[StepMemory], SwapReport]:
    """Runs training steps on random latents with materialised scores, with SDPA and with slices.

    Args:
        model: left with its own attention and without gradients; its weights do not change (the rate is zero).
        slicing: of the third measurement.
        resolution: edge of the images that the latents stand for, in pixels.
        batch: images a step.

    Returns:
        The three measurements, and the report of the swap with the plans that ran.
    """
    reports: list[SwapReport] = []
    variants: dict[str, Callable[[], object]] = {
        "plain (diffusers AttnProcessor)": lambda: model.unet.set_attn_processor(AttnProcessor()),
        "SDPA (diffusers AttnProcessor2_0)": lambda: model.unet.set_attn_processor(AttnProcessor2_0()),
        f"slicemod ({slicing.budget}, {slicing.policy})": lambda: reports.append(swap_attention(model.unet, slicing)),
    }
    step = _training_step(model, resolution, batch)
    step()  # makes the optimizer's state, which would count for the first variant alone
    measured = []
    for name, use in variants.items():
        use()
        peak = peak_memory(step)
        start = time.perf_counter()
        step()
        measured.append(StepMemory(name, resolution, batch, peak, time.perf_counter() - start))
    restore_attention(model.unet)
    model.zero_grad(set_to_none=True)
    return measured, reports[0]


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
