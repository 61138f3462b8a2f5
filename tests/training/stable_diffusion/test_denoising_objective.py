from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from slicemod.training.stable_diffusion.denoising_objective import Objective
from slicemod.user_error import UserError

TIMESTEPS = torch.tensor([0, 7, 250, 600, 999])


def scheduler(objective: Objective, **config: Any) -> DDPMScheduler:
    own = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config).config
    return DDPMScheduler.from_config(own, **objective.scheduler_changes(dict(own)))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_as_published(kind: Any) -> None:
    objective = Objective(prediction_type=kind, min_snr_gamma=5.0)
    schedule = scheduler(objective)
    ratio = compute_snr(schedule, TIMESTEPS)
    wanted = ratio.clamp(max=5) / (ratio if kind == "epsilon" else ratio + 1)
    torch.testing.assert_close(objective.weights(schedule, TIMESTEPS), wanted, rtol=1e-5, atol=0)
    assert torch.equal(Objective().weights(schedule, TIMESTEPS), torch.ones(5))


def test_velocity_is_signal_times_noise_less_sigma_times_latents() -> None:
    objective = Objective(prediction_type="v_prediction")
    schedule = scheduler(objective)
    latents, noise = torch.randn(2, 5, 3, 2, 2).double()
    kept = schedule.alphas_cumprod.double()[TIMESTEPS].view(-1, 1, 1, 1)
    wanted = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    torch.testing.assert_close(objective.target(schedule, latents, noise, TIMESTEPS), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(Objective().target(scheduler(Objective()), latents, noise, TIMESTEPS), noise)


def test_zero_terminal_snr_ends_in_pure_noise_with_finite_weights() -> None:
    objective = Objective(prediction_type="v_prediction", zero_terminal_snr=True, min_snr_gamma=5.0)
    schedule = scheduler(objective)
    latents, noise = torch.randn(2, 1, 3, 2, 2)
    last = torch.tensor([999])
    torch.testing.assert_close(schedule.add_noise(latents, noise, last), noise, rtol=0, atol=1e-3)
    assert schedule.config.timestep_spacing == "trailing"
    assert bool(torch.isfinite(objective.weights(schedule, TIMESTEPS)).all())


def test_noise_offset_moves_whole_channels() -> None:
    shape = torch.Size([64, 3, 16, 16])
    plain, offset = (Objective(noise_offset=size).noise(shape, torch.Generator().manual_seed(5)) for size in (0.0, 0.5))
    moved = offset - plain
    torch.testing.assert_close(moved, moved[..., :1, :1].expand(shape), rtol=0, atol=1e-6)
    assert moved[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0"),
        ({"noise_offset": -0.1}, "noise_offset must be at least 0"),
        ({"caption_dropout": 1.5}, "caption_dropout must be from 0 to 1"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr needs prediction_type v_prediction"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        scheduler(Objective(**settings))


def test_a_model_that_predicts_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="got 'sample' from the model's scheduler"):
        scheduler(Objective(), prediction_type="sample")
