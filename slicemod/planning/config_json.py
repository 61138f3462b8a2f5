"""Reads a `config.json` of diffusers or transformers, which a user's folder has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slicemod.planning.whole_latents import LATENT_PIXELS, pixels_per_latent
from slicemod.user_error import UserError

CONFIG = "config.json"


def read_config(file: Path) -> dict[str, Any]:
    """A config of diffusers or transformers.

    Raises:
        UserError: it is none.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: expected JSON, as diffusers writes it; got {error}. Name another file.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected the JSON of a dict; got a {type(config).__name__}. Name another file.")
    return config


def latent_pixels_of(pipeline: Path) -> int:
    """The edge in pixels that one latent stands for, by the autoencoder in the folder of a pipeline; 8 if it has none.

    Raises:
        UserError: the autoencoder's config cannot be read.
    """
    file = pipeline / "vae" / CONFIG
    return pixels_per_latent(read_config(file), str(file)) if file.is_file() else LATENT_PIXELS
