"""What a denoiser is trained for: the target, the weight of each timestep, and the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from slicemod.user_error import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Objective:
    """Loss and noise of the fine-tuning."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts: noise or velocity; null takes what the model was trained for."""
    min_snr_gamma: float | None = None
    """Caps the weight of little noised latents (Hang et al. 2023, arXiv:2303.09556; 5 is usual); null weighs all
    timesteps alike."""
    noise_offset: float = 0.0
    """Adds noise of this deviation that is constant over each channel, for pictures darker and brighter than grey."""
    zero_terminal_snr: bool = False
    """Rescales the schedule so that its last step is pure noise (Lin et al. 2023, arXiv:2305.08891, 3.1); needs
    v_prediction."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""

    def __post_init__(self) -> None:
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise UserError(f"model.objective.min_snr_gamma must be above 0, got {self.min_snr_gamma}: 5 is usual.")
        if not self.noise_offset >= 0:
            raise UserError(f"model.objective.noise_offset must be at least 0, got {self.noise_offset}: try 0.05.")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(
                f"model.objective.caption_dropout must be from 0 to 1, got {self.caption_dropout}: give a share such as"
                " 0.1."
            )

    def scheduler_changes(self, config: dict[str, Any]) -> dict[str, Any]:
        """Entries to replace in the config of the model's own scheduler.

        Raises:
            UserError: the two do not go together.
        """
        kind = self.prediction_type or config.get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise UserError(
                f"model.objective.prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {kind!r} from the"
                " model's scheduler. Name one of the two."
            )
        if self.zero_terminal_snr and kind == "epsilon":
            raise UserError(
                "model.objective.zero_terminal_snr needs prediction_type v_prediction, got epsilon: of pure noise the"
                " noise tells nothing about the image. Set prediction_type: v_prediction."
            )
        changes: dict[str, Any] = {"prediction_type": kind}
        if self.zero_terminal_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return changes

    def noise(self, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """Noise (B, c, h, w) float32 on the CPU."""
        noise = torch.randn(shape, generator=draw)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn(*shape[:2], 1, 1, generator=draw)
        return noise

    def target(self, scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict, (B, c, h, w)."""
        if scheduler.config.prediction_type == "epsilon":
            return noise
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def weights(self, scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor:
        """Weight of each image's squared error, (B,) float32."""
        if self.min_snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        ratio = kept / (1 - kept)  # signal to noise
        capped = ratio.clamp(max=self.min_snr_gamma)
        weights: Tensor = capped / (ratio if scheduler.config.prediction_type == "epsilon" else ratio + 1)
        return weights
