"""What makes a picture: text encoders, the model whose steps denoise, and an autoencoder; by name or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from slicemod.planning.autoencoders import AutoencoderSource, autoencoder_of_config
from slicemod.planning.config_json import CONFIG, read_config
from slicemod.planning.denoisers import config_of, find_denoiser
from slicemod.planning.prompt_encoders import KNOWN, KnownEncoder, PromptEncoderSource, encoder_of_config
from slicemod.planning.step_source import StepSource
from slicemod.planning.transformers import NAMED_TRANSFORMERS, TransformerSource
from slicemod.planning.unets import CLIP_TOKENS, NAMED_UNETS, UnetSource, autoencoder_of_yaml
from slicemod.user_error import UserError

_SD: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_SD3 = _SD | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_UNETS_AUTOENCODER = ("AutoencoderKL", _SD)
_CLIP_L, _CLIP_PROJECTED, _BIG_G = "CLIP ViT-L", "CLIP ViT-L, projected", "OpenCLIP ViT-bigG"
# The other parts of the named models: the autoencoder's class and config, and the text encoders, as published.
NAMED_PARTS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, ...]]] = {
    "sd15": (_UNETS_AUTOENCODER, (_CLIP_L,)),
    "sd15-top": (_UNETS_AUTOENCODER, (_CLIP_L,)),
    "sd21": (_UNETS_AUTOENCODER, ("OpenCLIP ViT-H",)),
    "sdxl": (_UNETS_AUTOENCODER, (_CLIP_L, _BIG_G)),
    "sd35-medium": (("AutoencoderKL", _SD3), (_CLIP_PROJECTED, _BIG_G, "T5-XXL, 256 tokens")),
    "sd35-large": (("AutoencoderKL", _SD3), (_CLIP_PROJECTED, _BIG_G, "T5-XXL, 256 tokens")),
    "flux-schnell": (("AutoencoderKL", _SD3), (_CLIP_L, "T5-XXL, 512 tokens")),
    "flux-dev": (("AutoencoderKL", _SD3), (_CLIP_L, "T5-XXL, 512 tokens")),
    "pixart-sigma": (_UNETS_AUTOENCODER, ("T5-XXL, 300 tokens",)),
    "qwen-image": (("AutoencoderKLQwenImage", {}), ("Qwen2.5-VL 7B",)),
    "wan-1.3b": (("AutoencoderKLWan", {}), ("UMT5-XXL",)),
    "wan-14b": (("AutoencoderKLWan", {}), ("UMT5-XXL",)),
}
_INDEX = "model_index.json"
_NEEDS_NO_MEMORY = ("scheduler", "tokenizer", "feature_extractor", "image_processor", "processor")


class PictureModel(NamedTuple):
    """The parts of a pipeline that take memory.

    Attributes:
        denoiser: the UNet or the transformer.
        autoencoder: its decoding half.
        encoders: the text encoders, in the order in which they run.
        left_out: names of parts that nothing is known of.
    """

    denoiser: StepSource
    autoencoder: AutoencoderSource
    encoders: tuple[PromptEncoderSource | KnownEncoder, ...]
    left_out: tuple[str, ...] = ()

    def autoencoder_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which the pipeline decodes: SDXL's does so in float32 where the model is in float16."""
        config = self.denoiser.config if isinstance(self.denoiser, UnetSource) else {}
        is_sdxl = config.get("addition_embed_type") == "text_time"
        upcasts = is_sdxl and dtype == torch.float16 and self.autoencoder.config.get("force_upcast", True)
        return torch.float32 if upcasts else dtype


def find_picture_model(source: str, frames: int | None = None) -> PictureModel:
    """The parts of the model that `source` names.

    Args:
        source: as `find_denoiser` takes it. A folder has to be a pipeline's, or lie in one.
        frames: of a video; None takes what its pipeline makes by default.

    Raises:
        UserError: there is no such model, or it has a part that is not known.
    """
    denoiser = find_denoiser(source, frames)
    if source in NAMED_UNETS or source in NAMED_TRANSFORMERS:
        (class_name, config), encoders = NAMED_PARTS[source]
        autoencoder = AutoencoderSource(class_name, config, denoiser.frames)
        return PictureModel(denoiser, autoencoder, tuple(KNOWN[name] for name in encoders))
    path = Path(source)
    if (file := config_of(path)) is not None:
        return _of_pipeline(file.parent.parent, denoiser)
    return PictureModel(denoiser, AutoencoderSource("AutoencoderKL", autoencoder_of_yaml(path)), ())


def _of_pipeline(folder: Path, denoiser: StepSource) -> PictureModel:
    file = folder / "vae" / CONFIG
    if not file.is_file() or not (folder / _INDEX).is_file():
        raise UserError(
            f"{folder}: expected the folder of a pipeline, with {_INDEX} and vae/{CONFIG}; one of them is not there. "
            "Name the pipeline's folder, or plan the model alone by slicemod plan --part unet, or transformer."
        )
    autoencoder = autoencoder_of_config(str(file), read_config(file), denoiser.frames)
    encoders, left_out = [], []
    for name, given in read_config(folder / _INDEX).items():
        if name[0] == "_" or not isinstance(given, list) or None in given or name in ("vae", "unet", "transformer"):
            continue
        config = folder / name / CONFIG
        if name.startswith("text_encoder") and config.is_file():
            encoders.append(encoder_of_config(str(config), given[1], read_config(config), _prompt_tokens(denoiser)))
        elif not name.startswith(_NEEDS_NO_MEMORY):
            left_out.append(name)
    return PictureModel(denoiser, autoencoder, tuple(encoders), tuple(left_out))


def _prompt_tokens(denoiser: StepSource) -> int:
    if not isinstance(denoiser, TransformerSource):
        return CLIP_TOKENS
    return denoiser.kind.prompt_tokens
