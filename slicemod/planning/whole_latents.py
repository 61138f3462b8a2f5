"""For which edges of an image an autoencoder and a UNet, which halve them from level to level, get whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATENT_PIXELS = 8  # of the autoencoders of all named models
_LEVELS_OF_AUTOENCODERS = (64,)  # AutoencoderKL's own block_out_channels
_LEVELS_OF_UNETS = (320, 640, 1280, 1280)  # UNet2DConditionModel's own block_out_channels


def halved_to_one(levels: int) -> int:
    """The edge that becomes 1 if it is halved between each two of `levels` levels."""
    return int(2 ** (levels - 1))


def pixels_per_latent(autoencoder: Mapping[str, Any]) -> int:
    """The edge, in pixels of the image, of the square that one latent stands for.

    Args:
        autoencoder: the config of an `AutoencoderKL`.
    """
    return halved_to_one(len(autoencoder.get("block_out_channels", _LEVELS_OF_AUTOENCODERS)))


def resolution_step(latent_pixels: int, unet: Mapping[str, Any]) -> int:
    """The edge of an image has to be a multiple of this number of pixels, so that autoencoder and UNet can halve it.

    Args:
        latent_pixels: the edge of the square that one latent stands for.
        unet: the config of a `UNet2DConditionModel`.
    """
    return latent_pixels * halved_to_one(len(unet.get("block_out_channels", _LEVELS_OF_UNETS)))
