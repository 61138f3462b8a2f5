"""The UNets that `slicemod plan` knows: by name, by a YAML of configs/, or by a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import nn

from slicemod.planning.config_json import CONFIG, latent_pixels_of, read_config
from slicemod.planning.resolutions import HIGHEST_RESOLUTION
from slicemod.planning.whole_latents import LATENT_PIXELS, pixels_per_latent, resolution_step
from slicemod.user_error import UserError

# Where the published unet/config.json of each model differs from UNet2DConditionModel's defaults.
NAMED_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    # The two upper levels of sd15, where almost all of its attention is.
    "sd15-top": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
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
CLIP_TOKENS = 77


class UnetSource(NamedTuple):
    """What is needed to build a UNet and its inputs.

    Attributes:
        config: the arguments of `UNet2DConditionModel`.
        latent_pixels: the edge, in pixels of the image, of the square that one latent pixel stands for.
        context_tokens: how many tokens the cross-attention looks at.
    """

    config: Mapping[str, Any]
    latent_pixels: int
    context_tokens: int

    @property
    def resolution_step(self) -> int:
        """The edge of an image has to be a multiple of this, so that autoencoder and UNet can halve it."""
        return resolution_step(self.latent_pixels, self.config)

    @property
    def frames(self) -> int:
        """A UNet makes an image."""
        return 1

    @property
    def most_pixels(self) -> int:
        """A UNet takes images of any size."""
        return HIGHEST_RESOLUTION

    @property
    def own_pixels(self) -> int | None:
        """The edge of the images that it was trained on, if its config tells."""
        latents = self.config.get("sample_size")  # a config need not have it, and may have two of them
        return latents * self.latent_pixels if isinstance(latents, int) else None

    @property
    def full_upcasts(self) -> bool | None:
        """Whether full attention has its scores in float32."""
        return bool(self.config.get("upcast_attention"))

    @property
    def guidance_batch(self) -> int:
        """Items of a call for one image: with the prompt and without."""
        return 2

    @property
    def latents_name(self) -> str:
        """The input that is denoised."""
        return "sample"

    def model(self, dtype: torch.dtype) -> Any:
        """The UNet on the device "meta"."""
        return meta_unet(self, dtype)

    def inputs(self, model: Any, dtype: torch.dtype, batch: int, pixels: int) -> dict[str, Any]:
        """Keyword arguments of one call, for square images of `pixels` by `pixels`."""
        return meta_inputs(model, dtype, batch, pixels // self.latent_pixels, self.context_tokens)

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """One call; returns the prediction."""
        return model(**inputs).sample


def find_unet(source: str) -> UnetSource:
    """The UNet that `source` names.

    Args:
        source: a key of `NAMED_UNETS`, a YAML file as in configs/, or a folder in diffusers' layout.

    Raises:
        UserError: there is no such model.
    """
    if source in NAMED_UNETS:
        return UnetSource(NAMED_UNETS[source], LATENT_PIXELS, CLIP_TOKENS)
    path = Path(source)
    for folder in (path, path / "unet"):
        if (folder / CONFIG).is_file():
            return _unet_of_folder(folder)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _unet_of_yaml(path)
    raise UserError(
        f"model: expected {', '.join(NAMED_UNETS)}, a YAML of configs/ or a folder in diffusers' layout; got "
        f"{source!r}. Correct the name or the path."
    )


def _unet_of_folder(folder: Path) -> UnetSource:
    config = read_config(folder / CONFIG)
    kind = config.get("_class_name", UNet2DConditionModel.__name__)
    if kind != UNet2DConditionModel.__name__:
        raise UserError(
            f"{folder}: expected the config.json of a UNet2DConditionModel; got one of {kind}. Name the folder of a "
            "pipeline or its unet folder."
        )
    own = {key: value for key, value in config.items() if key[0] != "_"}
    return UnetSource(own, latent_pixels_of(folder.parent), CLIP_TOKENS)


def _unet_of_yaml(path: Path) -> UnetSource:
    unet, autoencoder = _models_of_yaml(path)
    # A class label is one token.
    return UnetSource(unet, pixels_per_latent(autoencoder, f"{path}: model.autoencoder"), 1)


def autoencoder_of_yaml(path: Path) -> dict[str, Any]:
    """The arguments of the `AutoencoderKL` in a YAML as in configs/.

    Raises:
        UserError: it has none.
    """
    return _models_of_yaml(path)[1]


def _models_of_yaml(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        return model["unet"]["init_args"], model["autoencoder"]["init_args"]
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: expected a YAML with model.unet.init_args and model.autoencoder.init_args, as in "
            "configs/digits.yaml. Name another file; one that only changes another's settings has no UNet of its own."
        ) from error


def meta_unet(source: UnetSource, dtype: torch.dtype) -> Any:
    """The `UNet2DConditionModel` on the device "meta", with weights of `dtype` that take no memory.

    Raises:
        UserError: its arguments do not build a UNet.
    """
    build: Any = UNet2DConditionModel  # diffusers' classes have no types
    try:
        with torch.device("meta"):
            unet = build(**source.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: describes no UNet2DConditionModel: {error}. Correct its entries.") from error
    return nn.Module.to(unet, dtype)  # its own `to` warns of layers that trained weights would keep in float32


def meta_inputs(unet: Any, dtype: torch.dtype, batch: int, latent_size: int, tokens: int) -> dict[str, Any]:
    """Keyword arguments of one call of the UNet, `(batch, c, latent_size, latent_size)` latents and text."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    config = unet.config
    for name, known in (
        ("addition_embed_type", (None, "text_time")),
        ("class_embed_type", (None,)),
        ("encoder_hid_dim_type", (None,)),
    ):
        if config.get(name) not in known:
            raise UserError(
                f"model: expected a UNet conditioned on text, or on text and sizes as SDXL is; got {name}="
                f"{config[name]!r}. Name another model."
            )
    inputs: dict[str, Any] = {
        "sample": empty(batch, config.in_channels, latent_size, latent_size),
        "timestep": torch.empty(batch, device="meta", dtype=torch.long),
        "encoder_hidden_states": empty(batch, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        time_ids = 6
        text_width = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": empty(batch, text_width), "time_ids": empty(batch, time_ids)}
    if config.num_class_embeds is not None:
        inputs["class_labels"] = torch.empty(batch, device="meta", dtype=torch.long)
    return inputs
