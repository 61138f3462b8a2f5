from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slicemod.training.commands.fit_command import fit
from slicemod.training.stable_diffusion.text_encoders import TextEmbeddings
from slicemod.training.stable_diffusion.unet_requirements import require_known_kind, require_matching_text
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    tiny_config,
    write_config,
    write_images,
    write_text_encoder,
    write_tiny_model,
)

UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4}
AUTOENCODER = {"latent_channels": 4}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}


def test_unets_that_look_at_text_alone_or_at_sizes_too_are_taken_and_no_others() -> None:
    def is_taken(looks_at: str | None) -> bool:
        try:
            require_known_kind({**UNET, "addition_embed_type": looks_at}, AUTOENCODER, SCHEDULER)
        except UserError:
            return False
        return True

    kinds = None, "text", "text_time", "text_image", "image", "image_hint"  # all that diffusers has
    assert [kind for kind in kinds if is_taken(kind)] == [None, "text_time"]


@pytest.mark.parametrize(
    ("unet", "autoencoder", "scheduler", "named"),
    [
        ({"in_channels": 9}, {}, {}, "takes 9 channels, where a latent has 4, a mask and a masked image"),
        ({"in_channels": 8}, {}, {}, "takes 8 channels, where a latent has 4. Expected"),
        ({}, {"latent_channels": 16}, {}, "takes 4 channels, where a latent has 16"),
        ({"out_channels": 8}, {}, {}, "gives 8 channels, where a latent has 4"),
        ({"_class_name": "UNetMotionModel"}, {}, {}, "the UNet is a UNetMotionModel"),
        ({"addition_embed_type": "image"}, {}, {}, "looks at image"),
        ({"num_class_embeds": 1000}, {}, {}, "num_class_embeds 1000"),
        ({"encoder_hid_dim_type": "text_image_proj"}, {}, {}, "encoder_hid_dim_type text_image_proj"),
        ({}, {"latents_mean": [0.1]}, {}, "latents have a latents_mean"),
    ],
)
def test_what_would_be_fed_the_wrong_thing_is_refused(
    unet: dict[str, Any], autoencoder: dict[str, Any], scheduler: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        require_known_kind({**UNET, **unet}, {**AUTOENCODER, **autoencoder}, {**SCHEDULER, **scheduler})


def test_a_scheduler_without_betas_is_refused() -> None:
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler, has no beta_schedule"):
        require_known_kind(UNET, AUTOENCODER, {"_class_name": "FlowMatchEulerDiscreteScheduler"})


def test_text_of_another_width_is_refused() -> None:
    unet = {"cross_attention_dim": 24}
    require_matching_text(unet, TextEmbeddings(torch.zeros(1, 7, 24), None))
    with pytest.raises(UserError, match="embeddings is 24 wide, as the UNet looks at, got 23"):
        require_matching_text(unet, TextEmbeddings(torch.zeros(1, 7, 23), None))
    sdxl = {**unet, "addition_embed_type": "text_time", "addition_time_embed_dim": 5,
            "projection_class_embeddings_input_dim": 6 * 5 + 11}  # fmt: skip
    require_matching_text(sdxl, TextEmbeddings(torch.zeros(1, 7, 24), torch.zeros(1, 11)))
    with pytest.raises(UserError, match="summary is 11 wide, as the UNet looks at, got 13"):
        require_matching_text(sdxl, TextEmbeddings(torch.zeros(1, 7, 24), torch.zeros(1, 13)))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [("channels", "takes 9 channels"), ("text", "embeddings is 24 wide, as the UNet looks at, got 22")],
)
def test_a_run_is_refused_before_anything_is_cached(
    wrong: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if wrong == "channels":
        source = write_tiny_model(tmp_path / "sd15", "sd15", in_channels=9)
    else:
        source = write_tiny_model(tmp_path / "sd15", "sd15")
        write_text_encoder(source, "", 22, projected=False, length=11)
    config = tiny_config("sd15_full.yaml", source, write_images(tmp_path / "images"), trainer={"max_steps": 1})
    with pytest.raises(UserError, match=named):
        fit(["fit", "--config", write_config(tmp_path, config)])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
