"""Captions to what the cross-attention looks at: the CLIP text encoders of SD1.x, SD2.x and SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slicemod.training.content_hash import module_digest
from slicemod.training.pretrained import Pretrained
from slicemod.user_error import UserError


class TextEmbeddings(NamedTuple):
    """``context`` (B, tokens, d) and, for SDXL, ``pooled`` (B, p); None otherwise."""

    context: Tensor
    pooled: Tensor | None


class TextEncoders(nn.Module):
    """One CLIP text encoder, or SDXL's two whose tokens are concatenated.

    SD1.x and 2.x look at the last layer after its norm; SDXL at the last layer but one of both encoders and at the
    second one's projected summary (Podell et al. 2023, arXiv:2307.01952, 2.1).

    Args:
        tokenizers: one ``CLIPTokenizer`` an encoder.
        encoders: a ``CLIPTextModel``, or that and a ``CLIPTextModelWithProjection``.
    """

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tokenizers = list(tokenizers)
        self.encoders = nn.ModuleList(encoders).eval().requires_grad_(False)

    def digest(self) -> str:
        """Of weights and vocabularies: the same captions then give the same embeddings."""
        words = [str(sorted(tokenizer.get_vocab().items())) for tokenizer in self.tokenizers]
        return module_digest(self.encoders, *words)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Embeds captions, cut at the encoder's length, in float32."""
        states = []
        pooled = None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids  # (B, tokens)
            device = next(encoder.parameters()).device
            if len(self.encoders) == 1:
                states.append(encoder(ids.to(device))[0].float())
            else:
                out = encoder(ids.to(device), output_hidden_states=True)
                states.append(out.hidden_states[-2].float())
                pooled = out[0].float()
        return TextEmbeddings(torch.cat(states, dim=-1), pooled)


def load_text_encoders(pretrained: Pretrained) -> TextEncoders:
    """The text encoders of a model, in float32.

    Raises:
        UserError: transformers is not installed, or the folder lacks an encoder or a vocabulary.
    """
    try:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    except ImportError as error:
        raise UserError(
            "Encoding captions needs the package transformers, which is not installed: pip install 'slicemod[train]'."
        ) from error
    kinds: dict[str, Any] = {"": CLIPTextModel}
    if pretrained.unet_config().get("addition_embed_type") == "text_time":  # SDXL
        kinds["_2"] = CLIPTextModelWithProjection
    folder = pretrained.config_folder
    try:
        tokenizers = [CLIPTokenizer.from_pretrained(folder, subfolder=f"tokenizer{number}") for number in kinds]
        encoders = [_encoder(pretrained, kind, f"text_encoder{number}") for number, kind in kinds.items()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.source: {folder} cannot be read: expected {', '.join(f'text_encoder{n}/' for n in kinds)} and"
            f" {', '.join(f'tokenizer{n}/' for n in kinds)}. {error} Correct the name."
        ) from error
    return TextEncoders(tokenizers, encoders)


def _encoder(pretrained: Pretrained, kind: Any, subfolder: str) -> Any:
    if not pretrained.is_single_file:
        return kind.from_pretrained(pretrained.source, subfolder=subfolder, use_safetensors=True)
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    return create_diffusers_clip_model_from_ldm(
        kind, dict(pretrained.tensors), subfolder=subfolder, config=pretrained.config_folder
    )
