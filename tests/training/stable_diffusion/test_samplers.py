from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from slicemod.training.stable_diffusion.samplers import SAMPLERS, build_sampler, own_sampler_obstacle
from slicemod.user_error import UserError

CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PLAIN = {"prediction_type": "epsilon"}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_name_is_the_class_of_diffusers_and_ends_at_the_image(name: str) -> None:
    scheduler = build_sampler(CONFIG, PLAIN, name)
    assert isinstance(scheduler, getattr(diffusers, SAMPLERS[name].kind))
    kept = scheduler.alphas_cumprod
    torch.testing.assert_close(kept, diffusers.DDPMScheduler.from_config(CONFIG).alphas_cumprod)
    scheduler.set_timesteps(23)
    image, draw = torch.randn(1, 4, 5, 7), torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 5, 7) * scheduler.init_noise_sigma
    more = {} if name in ("heun", "pndm", "unipc") else {"generator": draw}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        signal = kept[int(timestep)]
        noise = (seen - signal.sqrt() * image) / (1 - signal).sqrt()  # what a UNet that knows the image predicts
        latents = scheduler.step(noise, timestep, latents, **more).prev_sample
    torch.testing.assert_close(latents, image, rtol=0, atol=0.1)


def test_the_own_class_is_taken_without_a_name() -> None:
    scheduler = build_sampler(CONFIG, PLAIN)
    assert type(scheduler).__name__ == "PNDMScheduler"
    assert {key: scheduler.config[key] for key in CONFIG if key != "_class_name"} == {
        key: value for key, value in CONFIG.items() if key != "_class_name"
    }


def test_an_own_class_that_cannot_follow_gives_way_to_ddim() -> None:
    assert own_sampler_obstacle(CONFIG, PLAIN) is None
    assert own_sampler_obstacle(CONFIG, ZERO_SNR) == "PNDMScheduler knows no rescale_betas_zero_snr"
    assert own_sampler_obstacle({**CONFIG, "_class_name": "MyScheduler"}, PLAIN) == "diffusers has no MyScheduler"
    scheduler = build_sampler(CONFIG, ZERO_SNR)
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.alphas_cumprod[-1] == 0


def test_what_cannot_be_chosen_is_refused_with_what_can() -> None:
    with pytest.raises(UserError, match=r"expected one of ddim, .*unipc, got 'plms'"):
        build_sampler(CONFIG, PLAIN, "plms")
    with pytest.raises(UserError, match=r"pndm knows no rescale_betas_zero_snr.*expected one of ddim, .*euler"):
        build_sampler(CONFIG, ZERO_SNR, "pndm")
