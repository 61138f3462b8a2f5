"""Runs a diffusers scheduler over a UNet with classifier-free guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """``context`` (B, tokens, d) and what SDXL's UNet takes besides: ``added``, tensors of B rows."""

    context: Tensor
    added: dict[str, Tensor]


class Denoiser:
    """Runs the last steps of a schedule.

    Args:
        unet: predicts from latents, a timestep and the conditioning.
        scheduler: copied, since ``set_timesteps`` writes into it.
        wanted: what is drawn.
        nothing: of the same shape, what is drawn where nothing is asked for.
        guidance: weight w of ``wanted``: the prediction is ``nothing + w * (wanted - nothing)``; at 1 ``nothing`` is
            left out.
        steps: of the whole schedule.
        tick: called after each step.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        wanted: Conditioning,
        nothing: Conditioning,
        guidance: float,
        steps: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.unet = unet
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(steps)
        self.guidance = guidance
        self.tick = tick
        both = wanted
        if guidance != 1:
            added = {name: torch.cat([nothing.added[name], tensor]) for name, tensor in wanted.added.items()}
            both = Conditioning(torch.cat([nothing.context, wanted.context]), added)
        self.conditioning = both  # 2B rows where guided, else B

    def run(self, noise: Tensor, steps: int, start: Tensor | None = None) -> Tensor:
        """Denoises ``noise`` (B, c, h, w), or ``start`` of that shape noised as the last ``steps`` steps find it."""
        scheduler = copy.deepcopy(self.scheduler)
        remaining = scheduler.timesteps[len(scheduler.timesteps) - steps :]
        if start is None:
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(start, noise, remaining[:1].expand(len(noise)))
        for timestep in remaining:
            predicted = self._predict(scheduler.scale_model_input(latents, timestep), timestep)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
            self.tick()
        denoised: Tensor = latents
        return denoised

    def _predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        context, added = self.conditioning
        extra: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
        if self.guidance == 1:
            plain: Tensor = self.unet(latents, timestep, context, **extra).sample
            return plain
        both: Tensor = self.unet(torch.cat([latents, latents]), timestep, context, **extra).sample
        none, wanted = both.chunk(2)
        guided: Tensor = none + self.guidance * (wanted - none)
        return guided
