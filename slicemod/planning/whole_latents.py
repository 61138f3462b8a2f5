"""For which edges of an image an autoencoder and a UNet, which halve them from level to level, get whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slicemod.planning.class_defaults import whole_config
from slicemod.user_error import UserError

LATENT_PIXELS = 8  # of the autoencoders of all named models
_LEVELS = ("block_out_channels", "dim_mult")  # the lists in configs of autoencoders with an entry for each level


def pixels_per_latent(autoencoder: Mapping[str, Any], where: str = "autoencoder") -> int:
    """The edge, in pixels of the image, of the square that one latent stands for.

    Args:
        autoencoder: the config of an autoencoder, an `AutoencoderKL` unless its `_class_name` says otherwise. What it
            leaves out is as its class has it; 8 if neither says how many levels there are.
        where: names it in the error.

    Raises:
        UserError: what should list the levels does not.
    """
    config = whole_config(autoencoder.get("_class_name", "AutoencoderKL"), autoencoder)
    entry = next((entry for entry in _LEVELS if entry in config), None)
    if entry is None:
        return LATENT_PIXELS
    if not isinstance(config[entry], list | tuple) or not config[entry]:
        raise UserError(f"{where}: expected a list with an entry for each level in {entry}; got {config[entry]!r}.")
    return _halved_to_one(len(config[entry]))


def resolution_step(latent_pixels: int, unet: Mapping[str, Any]) -> int:
    """The edge of an image has to be a multiple of this number of pixels, so that autoencoder and UNet can halve it.

    Args:
        latent_pixels: the edge of the square that one latent stands for.
        unet: the config of a `UNet2DConditionModel`.
    """
    return latent_pixels * _halved_to_one(len(whole_config("UNet2DConditionModel", unet)["block_out_channels"]))


def _halved_to_one(levels: int) -> int:
    """The edge that becomes 1 if it is halved between each two of `levels` levels."""
    return int(2 ** (levels - 1))
