"""The transformers that `slicemod plan` knows: by name, or by their diffusers config; and how a step of each is fed.

`TRANSFORMERS` has one record for each class of diffusers. To add a class, add its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicemod.planning.class_defaults import diffusers_class, whole_config
from slicemod.planning.kept_in_float32 import in_dtype
from slicemod.planning.resolutions import HIGHEST_RESOLUTION
from slicemod.planning.step_source import StepInputs
from slicemod.planning.whole_latents import LATENT_PIXELS
from slicemod.user_error import FieldError, UserError

Config = Mapping[str, Any]
_FRAMES = 81  # of a video, if nothing else is said: 5 seconds


class TransformerKind(NamedTuple):
    """What one class of transformers is fed with in a step of its pipeline.

    Attributes:
        inputs: makes the keyword arguments of `forward`, from its config, what a step is for, edge and frames of the
            latents, and tokens of the text.
        prompt_tokens: to which its pipeline pads a prompt by default, or cuts it.
        guidance_batch: items of a call for one image.
        patch: the edge, in latents, of the square that is one token.
        latents_name: the input that is denoised.
        frames_per_latent: of a video, how many frames one latent frame after the first one stands for; 0 for images.
        most_patches: the largest edge in patches that its position embedding has, or None.
        more_tokens: of the text, which other text encoders add.
    """

    inputs: Callable[[Config, StepInputs, int, int, int], dict[str, Any]]
    prompt_tokens: int
    guidance_batch: int
    patch: Callable[[Config], int]
    latents_name: str = "hidden_states"
    frames_per_latent: int = 0
    most_patches: Callable[[Config], int | None] = lambda _: None
    more_tokens: int = 0


def _flux(config: Config, step: StepInputs, edge: int, _frames: int, tokens: int) -> dict[str, Any]:
    patches = (edge // 2) ** 2
    given = {
        "hidden_states": step.empty(patches, config["in_channels"]),
        "encoder_hidden_states": step.empty(tokens, config["joint_attention_dim"]),
        "pooled_projections": step.empty(config["pooled_projection_dim"]),
        "timestep": step.empty(),
        "img_ids": _positions(step, patches, 3),
        "txt_ids": _positions(step, tokens, 3),
    }
    return given | ({"guidance": torch.empty(step.batch, device="meta")} if config["guidance_embeds"] else {})


def _sd3(config: Config, step: StepInputs, edge: int, _frames: int, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": step.empty(config["in_channels"], edge, edge),
        "encoder_hidden_states": step.empty(tokens, config["joint_attention_dim"]),
        "pooled_projections": step.empty(config["pooled_projection_dim"]),
        "timestep": step.numbers(),
    }


def _qwen_image(config: Config, step: StepInputs, edge: int, _frames: int, tokens: int) -> dict[str, Any]:
    patches = edge // config["patch_size"]
    return {
        "hidden_states": step.empty(patches**2, config["in_channels"]),
        "encoder_hidden_states": step.empty(tokens, config["joint_attention_dim"]),
        "timestep": step.empty(),
        "img_shapes": [[(1, patches, patches)]] * step.batch,
    }


def _wan(config: Config, step: StepInputs, edge: int, frames: int, tokens: int) -> dict[str, Any]:
    given = {
        "hidden_states": step.empty(config["in_channels"], frames, edge, edge),
        "encoder_hidden_states": step.empty(tokens, config["text_dim"]),
        "timestep": step.numbers(),
    }
    if config["image_dim"] is not None:  # the first image, by CLIP: 16 x 16 patches and a summary
        given["encoder_hidden_states_image"] = step.empty(257, config["image_dim"])
    return given


def _pixart(config: Config, step: StepInputs, edge: int, _frames: int, tokens: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if config["use_additional_conditions"]:
        sizes = {"resolution": step.empty(2), "aspect_ratio": step.empty(1)}
    return {
        "hidden_states": step.empty(config["in_channels"], edge, edge),
        "encoder_hidden_states": step.empty(tokens, config["caption_channels"] or config["cross_attention_dim"]),
        "encoder_attention_mask": torch.empty(step.batch, tokens, device="meta", dtype=torch.long),
        "timestep": step.numbers(),
        "added_cond_kwargs": sizes,
    }


def _positions(step: StepInputs, tokens: int, axes: int) -> Tensor:
    return torch.empty(tokens, axes, device="meta", dtype=step.dtype)


TRANSFORMERS: dict[str, TransformerKind] = {
    "FluxTransformer2DModel": TransformerKind(_flux, 512, 1, lambda _: 2),
    "PixArtTransformer2DModel": TransformerKind(_pixart, 300, 2, lambda config: int(config["patch_size"])),
    "QwenImageTransformer2DModel": TransformerKind(_qwen_image, 512, 1, lambda config: int(config["patch_size"])),
    "SD3Transformer2DModel": TransformerKind(
        _sd3,
        256,
        2,
        lambda config: int(config["patch_size"]),
        most_patches=lambda config: int(config["pos_embed_max_size"]),
        more_tokens=77,  # of CLIP
    ),
    "WanTransformer3DModel": TransformerKind(
        _wan,
        512,
        1,
        lambda config: int(config["patch_size"][1]),
        frames_per_latent=4,
        most_patches=lambda config: int(config["rope_max_seq_len"]),
    ),
}

# The published transformer/config.json of each model: its class, and where it differs from the class's defaults.
NAMED_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", {}),
    "pixart-sigma": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "interpolation_scale": 2, "caption_channels": 4096, "use_additional_conditions": False},
    ),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "sd35-large": (
        "SD3Transformer2DModel",
        {
            "caption_projection_dim": 2432,
            "num_attention_heads": 38,
            "num_layers": 38,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "sd35-medium": (
        "SD3Transformer2DModel",
        {
            "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
            "num_attention_heads": 24,
            "num_layers": 24,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
        },
    ),
    "wan-1.3b": ("WanTransformer3DModel", {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}),
    "wan-14b": ("WanTransformer3DModel", {}),
}


class TransformerSource(NamedTuple):
    """What is needed to build a transformer and its inputs.

    Attributes:
        class_name: a key of `TRANSFORMERS`.
        config: the arguments of that class; others are its defaults.
        latent_pixels: the edge, in pixels of the image, of the square that one latent pixel stands for.
        frames: of a video; 1 for an image.
    """

    class_name: str
    config: Mapping[str, Any]
    latent_pixels: int = LATENT_PIXELS
    frames: int = 1

    @property
    def kind(self) -> TransformerKind:
        """The record of its class."""
        return TRANSFORMERS[self.class_name]

    @property
    def resolution_step(self) -> int:
        """The edge of an image has to be a multiple of this: whole patches."""
        return self.latent_pixels * self.kind.patch(self._whole_config())

    @property
    def most_pixels(self) -> int:
        """As far as the position embedding goes."""
        patches = self.kind.most_patches(self._whole_config())
        return HIGHEST_RESOLUTION if patches is None else min(HIGHEST_RESOLUTION, patches * self.resolution_step)

    @property
    def own_pixels(self) -> int | None:
        """The edge of the images that it was trained on, if its config tells."""
        latents = self.config.get("sample_size")
        return latents * self.latent_pixels if isinstance(latents, int) else None

    @property
    def full_upcasts(self) -> bool | None:
        """All of these compute attention by PyTorch's function; nobody runs them with full attention."""
        return None

    @property
    def guidance_batch(self) -> int:
        """Items of a call for one image."""
        return self.kind.guidance_batch

    @property
    def latents_name(self) -> str:
        """The input that is denoised."""
        return self.kind.latents_name

    @property
    def latent_frames(self) -> int:
        """How many frames the latents have."""
        return 1 if self.frames == 1 else (self.frames - 1) // self.kind.frames_per_latent + 1

    def model(self, dtype: torch.dtype) -> Any:
        """The transformer on the device "meta", with weights of `dtype` but those that diffusers keeps in float32.

        Raises:
            UserError: its config builds none.
        """
        try:
            with torch.device("meta"):
                model = diffusers_class(self.class_name).from_config(dict(self.config))
        except (TypeError, ValueError) as error:
            raise UserError(f"model: describes no {self.class_name}: {error}. Correct its entries.") from error
        return in_dtype(model, dtype)

    def inputs(self, model: Any, dtype: torch.dtype, batch: int, pixels: int) -> dict[str, Any]:
        """Keyword arguments of one call, for square images of `pixels` by `pixels`."""
        step = StepInputs(dtype, batch, pixels, self.frames)
        edge = pixels // self.latent_pixels
        kind = self.kind
        return kind.inputs(model.config, step, edge, self.latent_frames, kind.prompt_tokens + kind.more_tokens)

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """One call; returns the prediction."""
        return model(**inputs).sample

    def _whole_config(self) -> Mapping[str, Any]:
        return whole_config(self.class_name, self.config)


def find_transformer(name: str, frames: int | None) -> TransformerSource:
    """A transformer of `NAMED_TRANSFORMERS`.

    Raises:
        UserError: it makes no such videos.
    """
    class_name, config = NAMED_TRANSFORMERS[name]
    return transformer_of_config(name, {"_class_name": class_name, **config}, 8, frames)


def transformer_of_config(where: str, config: Config, latent_pixels: int, frames: int | None) -> TransformerSource:
    """The transformer that a diffusers config describes.

    Raises:
        UserError: of a class that is not known, or that makes no such videos.
    """
    class_name = config.get("_class_name")
    if class_name not in TRANSFORMERS:
        raise UserError(
            f"{where}: expected the config of a UNet2DConditionModel or of one of {', '.join(TRANSFORMERS)}; got one "
            f"of {class_name}, whose inputs are not known. Name another model."
        )
    spacing = TRANSFORMERS[class_name].frames_per_latent
    if frames is None:
        frames = _FRAMES if spacing else 1
    if frames != 1 and (spacing == 0 or frames < 1 or (frames - 1) % spacing):
        expected = f"a multiple of {spacing} and one more" if spacing else f"1, since {class_name} makes images"
        raise FieldError(f"frames: expected {expected}; got {frames}. Correct the number.")
    own = {key: value for key, value in config.items() if key[0] != "_"}
    return TransformerSource(class_name, own, latent_pixels, frames)
