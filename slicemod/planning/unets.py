"""The UNets that `slicemod plan` knows: by name, by a YAML of configs/, or by a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import nn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from slicemod.user_error import UserError

# The differences to UNet2DConditionModel's defaults in the models' published unet/config.json.
NAMED_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_TOKENS = 77
_DEFAULT_LEVELS = (320, 640, 1280, 1280)  # UNet2DConditionModel's own block_out_channels


class UnetSource(NamedTuple):
    """What builds a UNet: the arguments of `UNet2DConditionModel`, and what its latents and its context are.

    `latent_pixels` is the edge in image pixels that one latent pixel stands for; `context_tokens` is how many tokens
    the cross-attention looks at.
    """

    config: Mapping[str, Any]
    latent_pixels: int
    context_tokens: int

    @property
    def resolution_step(self) -> int:
        """Edges in pixels that autoencoder and UNet halve down to whole latents are multiples of this."""
        levels = len(self.config.get("block_out_channels", _DEFAULT_LEVELS))
        return int(self.latent_pixels * 2 ** (levels - 1))


def find_unet(source: str) -> UnetSource:
    """The UNet that `source` names.

    Args:
        source: a key of `NAMED_UNETS`, a YAML file as in configs/, or a folder in diffusers' layout.

    Raises:
        UserError: there is no such model.
    """
    if source in NAMED_UNETS:
        return UnetSource(NAMED_UNETS[source], 8, _CLIP_TOKENS)
    path = Path(source)
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            return UnetSource({key: value for key, value in config.items() if key[0] != "_"}, 8, _CLIP_TOKENS)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _unet_of_yaml(path)
    raise UserError(
        f"model: expected {', '.join(NAMED_UNETS)}, a YAML of configs/ or a folder in diffusers' layout; got "
        f"{source!r}. Correct the name or the path."
    )


def _unet_of_yaml(path: Path) -> UnetSource:
    try:
        model = yaml.safe_load(path.read_text())["model"]
        unet, autoencoder = model["unet"]["init_args"], model["autoencoder"]["init_args"]
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: expected a YAML with model.unet.init_args and model.autoencoder.init_args, as in "
            "configs/digits.yaml. Name another file."
        ) from error
    latent_pixels = 2 ** (len(autoencoder["block_out_channels"]) - 1)  # AutoencoderKL halves between its blocks
    return UnetSource(unet, latent_pixels, 1)  # a class label is one token


def meta_unet(source: UnetSource, dtype: torch.dtype) -> Any:
    """The `UNet2DConditionModel` on the device "meta", with weights of `dtype` that take no memory.

    Raises:
        UserError: its arguments build no UNet.
    """
    build: Any = UNet2DConditionModel  # diffusers' classes have no types
    try:
        with torch.device("meta"):
            unet = build(**source.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: describes no UNet2DConditionModel: {error}. Correct its entries.") from error
    for module in unet.modules():  # its own `to` warns of what only a model with trained weights has to mind
        nn.Module.to(module, dtype)
    return unet


def meta_inputs(unet: Any, dtype: torch.dtype, batch: int, latent_size: int, tokens: int) -> dict[str, Any]:
    """Keyword arguments of one call of the UNet, `(batch, c, latent_size, latent_size)` latents and text."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    config = unet.config
    extra: dict[str, torch.Tensor] = {}
    if config.addition_embed_type == "text_time":
        time_ids = 6
        text_width = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
        extra = {"text_embeds": empty(batch, text_width), "time_ids": empty(batch, time_ids)}
    return {
        "sample": empty(batch, config.in_channels, latent_size, latent_size),
        "timestep": torch.empty(batch, device="meta", dtype=torch.long),
        "encoder_hidden_states": empty(batch, tokens, config.cross_attention_dim),
        "added_cond_kwargs": extra,
    }
