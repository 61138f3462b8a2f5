"""Runs a diffusers scheduler over a UNet with classifier-free guidance."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """``context`` (B, tokens, d) and what SDXL's UNet takes besides: ``added``, tensors of B rows."""

    context: Tensor
    added: dict[str, Tensor]


class Denoiser:
    """Runs a schedule, or its last steps.

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

    @property
    def calls(self) -> int:
        """How often the UNet runs in the whole schedule: a step of some schedulers takes two."""
        return len(self.scheduler.timesteps)

    def run(self, noise: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """Denoises ``noise`` (B, c, h, w).

        Args:
            noise: of deviation 1.
            draw: of the noise that some schedulers add at each step; None is PyTorch's own.
        """
        return self._run(noise * self.scheduler.init_noise_sigma, self.scheduler.timesteps, draw)

    def refine(self, start: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Denoises ``start`` (B, c, h, w), noised as the last ``steps`` steps find it."""
        remaining = self.scheduler.timesteps[len(self.scheduler.timesteps) - steps :]
        return self._run(self.scheduler.add_noise(start, noise, remaining[:1].expand(len(noise))), remaining, None)

    def _run(self, latents: Tensor, timesteps: Tensor, draw: torch.Generator | None) -> Tensor:
        scheduler = copy.deepcopy(self.scheduler)
        drawn_by = {"generator": draw} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for timestep in timesteps:
            predicted = self._predict(scheduler.scale_model_input(latents, timestep), timestep)
            latents = scheduler.step(predicted, timestep, latents, **drawn_by).prev_sample
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
