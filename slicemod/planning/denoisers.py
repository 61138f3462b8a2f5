"""Finds the model whose steps make a picture, a UNet or a transformer: by name, YAML, folder or config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slicemod.planning.plan_options import MODELS
from slicemod.planning.step_source import StepSource
from slicemod.planning.transformers import NAMED_TRANSFORMERS, find_transformer, transformer_of_config
from slicemod.planning.unets import NAMED_UNETS, find_unet
from slicemod.user_error import FieldError, UserError

CONFIG = "config.json"
_UNET = "UNet2DConditionModel"
_LATENT_PIXELS = 8  # of all autoencoders of named models


def find_denoiser(source: str, frames: int | None = None) -> StepSource:
    """The model that `source` names.

    Args:
        source: a name of `MODELS`, a YAML file as in configs/, a folder in diffusers' layout (a pipeline's, or that of
            its model), or the `config.json` of one.
        frames: of a video; None takes what its pipeline makes by default.

    Raises:
        UserError: there is no such model, or it makes no such videos.
    """
    if source in NAMED_TRANSFORMERS:
        return find_transformer(source, frames)
    file = config_of(Path(source))
    config = {} if file is None else read_config(file)
    if file is not None and config.get("_class_name", _UNET) != _UNET:
        return transformer_of_config(str(file), config, _latent_pixels(file.parent.parent / "vae" / CONFIG), frames)
    if frames not in (None, 1):
        raise FieldError(f"frames: expected 1, since a UNet makes images; got {frames}. Leave it out.")
    if source in NAMED_UNETS or file is not None or Path(source).suffix in (".yaml", ".yml"):
        return find_unet(source if file is None else str(file.parent))
    raise UserError(
        f"model: expected {', '.join(MODELS)}, a YAML of configs/, a folder in diffusers' layout or its {CONFIG}; got "
        f"{source!r}. Correct the name or the path."
    )


def config_of(path: Path) -> Path | None:
    """The `config.json` that a path means: itself, that of a model's folder, or of a pipeline's UNet or transformer."""
    files = (path, path / CONFIG, path / "unet" / CONFIG, path / "transformer" / CONFIG)
    return next((file for file in files if file.name == CONFIG and file.is_file()), None)


def read_config(file: Path) -> dict[str, Any]:
    """A config of diffusers or transformers.

    Raises:
        UserError: it is none.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: expected JSON, as diffusers writes it; got {error}. Name another file.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected the JSON of a dict; got a {type(config).__name__}. Name another file.")
    return config


def _latent_pixels(autoencoder: Path) -> int:
    """The edge in pixels that one latent stands for; `_LATENT_PIXELS` where there is no autoencoder to tell."""
    if not autoencoder.is_file():
        return _LATENT_PIXELS
    config = read_config(autoencoder)
    levels = config["block_out_channels"] if "block_out_channels" in config else config.get("dim_mult", range(4))
    return int(2 ** (len(levels) - 1))
