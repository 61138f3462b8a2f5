"""Captions to what the cross-attention looks at: the CLIP text encoders of SD1.x, SD2.x and SDXL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from slicemod.planning.unets import CLIP_TOKENS
from slicemod.rounding import round_up
from slicemod.training.stable_diffusion.content_hash import module_digest
from slicemod.training.stable_diffusion.pretrained import Pretrained, load_part, reading_part
from slicemod.user_error import UserError

CHUNK = CLIP_TOKENS - 2  # tokens of a caption that an encoder takes at once, between a start and an end

_SHOWN = 40  # characters of a caption in a message


class TextEmbeddings(NamedTuple):
    """``context`` (B, tokens, d) and, for SDXL, ``pooled`` (B, p); None otherwise."""

    context: Tensor
    pooled: Tensor | None


class CutCaption(NamedTuple):
    """A caption, how many tokens it has, and how many of them are looked at."""

    caption: str
    tokens: int
    kept: int


class CaptionCutter(Protocol):
    """Text encoders, as far as they tell what they cut."""

    def cut(self, captions: Sequence[str]) -> list[CutCaption]:
        """Those that are too long to be looked at whole."""


class TextEncoders(nn.Module):
    """One CLIP text encoder, or SDXL's two whose tokens are concatenated.

    SD1.x and 2.x look at the last layer after its norm; SDXL at the last layer but one of both encoders and at the
    second one's projected summary (Podell et al. 2023, arXiv:2307.01952, 2.1).

    Captions longer than an encoder takes are cut into chunks that each have a start and an end of their own, and whose
    embeddings follow one another, as webuis have it; the summary is the first chunk's.

    Args:
        tokenizers: one ``CLIPTokenizer`` an encoder.
        encoders: a ``CLIPTextModel``, or that and a ``CLIPTextModelWithProjection``.
        chunks: of every caption, the short ones too: embeddings of a batch are of one length.
    """

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module], chunks: int = 1) -> None:
        super().__init__()
        self.tokenizers = list(tokenizers)
        self.encoders = nn.ModuleList(encoders).eval().requires_grad_(False)
        self.chunks = chunks

    def digest(self) -> str:
        """Of weights, vocabularies and chunks: the same captions then give the same embeddings."""
        words = [str(sorted(tokenizer.get_vocab().items())) for tokenizer in self.tokenizers]
        return module_digest(self.encoders, *words, *([self.chunks] if self.chunks > 1 else []))

    def cut(self, captions: Sequence[str]) -> list[CutCaption]:
        """Those of the captions that have more tokens than are looked at."""
        found = []
        for caption, *lengths in zip(
            captions, *(map(len, _tokens(one, captions)) for one in self.tokenizers), strict=True
        ):
            kept = self.chunks * min(_room(tokenizer) for tokenizer in self.tokenizers)
            if max(lengths) > kept:
                found.append(CutCaption(caption, max(lengths), kept))
        return found

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Embeds captions, cut at ``chunks`` times the encoder's length, in float32."""
        states = []
        pooled = None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = _chunked(tokenizer, captions, self.chunks).to(next(encoder.parameters()).device)  # (B chunks, tokens)
            if len(self.encoders) == 1:
                state = encoder(ids)[0]
            else:
                out = encoder(ids, output_hidden_states=True)
                state = out.hidden_states[-2]
                pooled = out[0].float()[:: self.chunks]
            states.append(state.float().reshape(len(captions), -1, state.shape[-1]))  # (B, chunks tokens, d)
        return TextEmbeddings(torch.cat(states, dim=-1), pooled)


def tell_of_cut(encoders: CaptionCutter, captions: Sequence[str], what: str) -> str | None:
    """How many captions are cut, for a user; None where none are.

    Args:
        encoders: what encodes them.
        captions: what is encoded.
        what: their name in the plural, such as "captions".
    """
    cut = encoders.cut(captions)
    if not cut:
        return None
    caption, tokens, kept = max(cut, key=lambda one: one.tokens)
    need = round_up(tokens, CHUNK)
    shown = repr(caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN]}...")
    return (
        f"{len(cut)} of {len(captions)} {what} have more than {kept} tokens and are cut there; the longest,"
        f" {shown}, has {tokens}. {need} tokens would hold them all (model.max_tokens in training,"
        " --max-tokens in sampling)."
    )


def _room(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length) - 2  # but for start and end


def _tokens(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """Of each caption, without start and end."""
    ids: list[list[int]] = tokenizer(
        list(captions), add_special_tokens=False, truncation=False, verbose=False
    ).input_ids
    return ids


def _chunked(tokenizer: Any, captions: Sequence[str], chunks: int) -> Tensor:
    """Tokens of captions in chunks with a start, an end and padding each, (B chunks, tokens)."""
    room = _room(tokenizer)
    rows = []
    for ids in _tokens(tokenizer, captions):
        for first in range(0, chunks * room, room):
            part = [tokenizer.bos_token_id, *ids[first : min(first + room, len(ids))], tokenizer.eos_token_id]
            rows.append(part + [tokenizer.pad_token_id] * (room + 2 - len(part)))
    return torch.tensor(rows)


def require_max_tokens(max_tokens: int) -> None:
    """Checks how many tokens of a caption are looked at.

    Raises:
        UserError: it is no whole number of chunks.
    """
    if max_tokens < CHUNK or max_tokens % CHUNK:
        raise UserError(
            f"max_tokens must be a multiple of {CHUNK}, which CLIP takes at once, got {max_tokens}: use"
            f" {max(CHUNK, round_up(max_tokens, CHUNK))}."
        )


def load_text_encoders(pretrained: Pretrained, max_tokens: int = CHUNK) -> TextEncoders:
    """The text encoders of a model, in float32.

    Args:
        pretrained: the model.
        max_tokens: of a caption, beside start and end; a multiple of 75, which CLIP takes at once.

    Raises:
        UserError: transformers is not installed, or the folder lacks an encoder or a vocabulary, or one is damaged.
    """
    require_max_tokens(max_tokens)
    try:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as error:
        raise UserError(
            "Encoding captions needs the package transformers, which is not installed: pip install 'slicemod[train]'."
        ) from error
    kinds: dict[str, Any] = {"": CLIPTextModel}
    if pretrained.unet_config().get("addition_embed_type") == "text_time":  # SDXL
        kinds["_2"] = CLIPTextModelWithProjection
    tokenizers = [_tokenizer(pretrained.config_folder, f"tokenizer{number}") for number in kinds]
    with _no_bars():
        encoders = [_encoder(pretrained, kind, f"text_encoder{number}") for number, kind in kinds.items()]
    return TextEncoders(tokenizers, encoders, max_tokens // CHUNK)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bar, one for every encoder, of what takes a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(folder: str, subfolder: str) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, subfolder=subfolder)
    except Exception as error:  # of a damaged vocabulary the package tokenizers raises a plain Exception
        raise UserError(
            f"model.source: {folder} ({subfolder}/) cannot be read: expected a CLIP vocabulary, vocab.json and"
            f" merges.txt. {error} Correct the name, or copy the folder again."
        ) from error


def _encoder(pretrained: Pretrained, kind: Any, subfolder: str) -> Any:
    if not pretrained.is_single_file:
        return load_part(kind, pretrained.source, subfolder)
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    with reading_part(pretrained.config_folder, f"{subfolder}/"):
        return create_diffusers_clip_model_from_ldm(
            kind, dict(pretrained.tensors), subfolder=subfolder, config=pretrained.config_folder
        )
