"""Finds the model whose steps make a picture, a UNet or a transformer: by name, YAML, folder or config."""

from __future__ import annotations

from pathlib import Path

from slicemod.planning.config_json import CONFIG, latent_pixels_of, read_config
from slicemod.planning.plan_options import MODELS
from slicemod.planning.step_source import StepSource
from slicemod.planning.transformers import NAMED_TRANSFORMERS, find_transformer, transformer_of_config
from slicemod.planning.unets import NAMED_UNETS, find_unet
from slicemod.user_error import FieldError, UserError

_UNET = "UNet2DConditionModel"


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
        return transformer_of_config(str(file), config, latent_pixels_of(file.parent.parent), frames)
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
