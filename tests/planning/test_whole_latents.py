"""Edges that autoencoder and UNet halve down to whole latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from slicemod.planning.whole_latents import pixels_per_latent, resolution_step
from slicemod.user_error import UserError


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_latent_stands_for_as_many_pixels_as_the_autoencoder_halves_away(levels: int) -> None:
    autoencoder = AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
    )
    edge = 4 * pixels_per_latent(autoencoder.config)
    assert autoencoder.encode(torch.zeros(1, 3, edge, edge)).latent_dist.mean.shape[2:] == (4, 4)


def test_what_a_config_leaves_out_is_as_its_class_has_it() -> None:
    assert pixels_per_latent({}) == pixels_per_latent(AutoencoderKL().config) == 1
    with torch.device("meta"):
        unet = UNet2DConditionModel()
    assert resolution_step(8, {}) == resolution_step(8, unet.config) == 64


def test_an_autoencoder_that_diffusers_does_not_have_halves_three_times_unless_its_config_says_otherwise() -> None:
    own = {"_class_name": "OwnAutoencoder"}
    assert pixels_per_latent(own) == 8
    assert pixels_per_latent(own | {"dim_mult": [1, 2, 4]}) == 4


@pytest.mark.parametrize("levels", [5, [], "four"])
def test_levels_that_are_no_list_are_named(levels: object) -> None:
    with pytest.raises(UserError, match=r"^a\.yaml: expected a list with an entry for each level in block_out"):
        pixels_per_latent({"block_out_channels": levels}, "a.yaml")
