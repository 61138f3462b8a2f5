"""The text encoders that `slicemod plan` knows: by transformers' config, and of the named models by a table.

`ENCODERS` has one record for each class of transformers. To add a class, add its record. The figures of `KNOWN` stand
in place of a trace, because transformers takes seconds to load; a test traces them all again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicemod.planning.kept_in_float32 import in_dtype
from slicemod.planning.memory_timeline import StepPeak
from slicemod.planning.resolutions import HIGHEST_RESOLUTION
from slicemod.user_error import UserError

Config = Mapping[str, Any]


class EncoderKind(NamedTuple):
    """One class of text encoders.

    Attributes:
        tokens_of_config: its config has the number of a prompt's tokens, in `max_position_embeddings`. Otherwise the
            pipeline decides.
        template_tokens: what the pipeline writes around the prompt.
        all_states: the pipeline asks for the output of every layer.
    """

    tokens_of_config: bool = False
    template_tokens: int = 0
    all_states: bool = False


ENCODERS = {
    "CLIPTextModel": EncoderKind(tokens_of_config=True, all_states=True),
    "CLIPTextModelWithProjection": EncoderKind(tokens_of_config=True, all_states=True),
    "Qwen2_5_VLForConditionalGeneration": EncoderKind(template_tokens=34, all_states=True),
    "T5EncoderModel": EncoderKind(),
    "UMT5EncoderModel": EncoderKind(),
}


@dataclass(frozen=True)
class PromptEncoderSource:
    """What is needed to build a text encoder and its inputs.

    Attributes:
        class_name: a key of `ENCODERS`.
        config: the arguments of its config; others are the defaults.
        tokens: of a prompt.
    """

    class_name: str
    config: Config
    tokens: int

    resolution_step = 1
    latent_pixels = 1
    frames = 1
    most_pixels = HIGHEST_RESOLUTION
    own_pixels = None
    full_upcasts = False
    guidance_batch = 1  # pipelines encode the prompt and the negative one after the other
    latents_name = "input_ids"

    def model(self, dtype: torch.dtype) -> Any:
        """The text encoder on the device "meta".

        Raises:
            UserError: its config builds none.
        """
        import transformers

        build = getattr(transformers, self.class_name)
        try:
            with torch.device("meta"):
                model = build(build.config_class(**self.config))
        except (TypeError, ValueError) as error:
            raise UserError(f"text encoder: describes no {self.class_name}: {error}. Correct its entries.") from error
        return in_dtype(model.eval(), dtype)

    def inputs(self, model: Any, dtype: torch.dtype, batch: int, pixels: int) -> dict[str, Any]:
        """Tokens `(batch, tokens)`, of an image of any size."""
        del model, dtype, pixels
        return {self.latents_name: torch.empty(batch, self.tokens, device="meta", dtype=torch.long)}

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Encodes; returns the last layer's output."""
        encoded: Tensor = model(**inputs, output_hidden_states=ENCODERS[self.class_name].all_states)[0]
        return encoded


def encoder_of_config(where: str, class_name: str, config: Config, prompt_tokens: int) -> PromptEncoderSource:
    """The text encoder that a config of transformers describes.

    Args:
        where: whose config it is, for errors.
        class_name: of transformers.
        config: its config.
        prompt_tokens: to which the pipeline pads a prompt for encoders without a length of their own.

    Raises:
        UserError: of a class that is not known.
    """
    if class_name not in ENCODERS:
        raise UserError(
            f"{where}: expected the config of one of {', '.join(ENCODERS)}; got one of {class_name}, whose inputs are "
            "not known. Plan the model alone by slicemod plan --part unet, or transformer."
        )
    kind = ENCODERS[class_name]
    own = {key: value for key, value in config.items() if key[0] != "_" and key != "architectures"}
    tokens = int(own.get("max_position_embeddings", 77)) if kind.tokens_of_config else prompt_tokens
    return PromptEncoderSource(class_name, own, tokens + kind.template_tokens)


class KnownEncoder(NamedTuple):
    """A published text encoder.

    Attributes:
        source: its class, its config, and the tokens of its prompts.
        figures: by dtype, the bytes of its weights, and the bytes that it holds beyond them at its peak on one prompt.
    """

    source: PromptEncoderSource
    figures: Mapping[torch.dtype, tuple[int, int]]

    def peak(self, dtype: torch.dtype) -> StepPeak:
        """The peak of encoding one prompt."""
        weights, activations = self.figures[dtype]
        return StepPeak(weights, activations, 0, 0, 0)


_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
_OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
_QWEN25_VL = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    "tie_word_embeddings": False,
}


def _known(class_name: str, config: Config, tokens: int, *figures: tuple[int, int]) -> KnownEncoder:
    """`figures` in float16, bfloat16 and float32."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return KnownEncoder(PromptEncoderSource(class_name, config, tokens), dict(zip(dtypes, figures, strict=True)))


_T5 = ("T5EncoderModel", _T5_XXL)
_T5_WEIGHTS = (11_537_887_232, 9_524_621_312, 19_049_242_624)  # float16 keeps some in float32
KNOWN = {
    "CLIP ViT-L": _known(
        "CLIPTextModel", _CLIP_L, 77,
        (246_121_576, 3_075_072), (246_121_576, 3_075_072), (492_242_536, 6_150_144),
    ),
    "CLIP ViT-L, projected": _known(
        "CLIPTextModelWithProjection", _CLIP_L | {"projection_dim": 768}, 77,
        (247_301_224, 3_075_072), (247_301_224, 3_075_072), (494_601_832, 6_150_144),
    ),
    "OpenCLIP ViT-H": _known(
        "CLIPTextModel", _OPENCLIP_H, 77,
        (680_776_296, 5_834_752), (680_776_296, 5_834_752), (1_361_551_976, 11_669_504),
    ),
    "OpenCLIP ViT-bigG": _known(
        "CLIPTextModelWithProjection", _OPENCLIP_G | {"projection_dim": 1280}, 77,
        (1_389_320_296, 9_067_520), (1_389_320_296, 9_067_520), (2_778_639_976, 18_135_040),
    ),
    "T5-XXL, 256 tokens": _known(*_T5, 256, *zip(_T5_WEIGHTS, (47_185_920, 37_748_736, 75_497_472), strict=True)),
    "T5-XXL, 300 tokens": _known(*_T5, 300, *zip(_T5_WEIGHTS, (56_985_600, 45_926_400, 91_852_800), strict=True)),
    "T5-XXL, 512 tokens": _known(*_T5, 512, *zip(_T5_WEIGHTS, (111_149_056, 97_126_400, 194_119_680), strict=True)),
    "UMT5-XXL": _known(
        "UMT5EncoderModel", _T5_XXL | {"vocab_size": 256_384}, 512,
        (13_375_086_592, 101_320_704), (11_361_820_672, 97_126_400), (22_723_641_344, 194_119_680),
    ),
    "Qwen2.5-VL 7B": _known(
        "Qwen2_5_VLForConditionalGeneration", _QWEN25_VL, 512 + 34,
        (16_584_333_648, 310_861_824), (16_584_333_648, 310_861_824), (33_168_667_296, 621_723_648),
    ),
}  # fmt: skip
