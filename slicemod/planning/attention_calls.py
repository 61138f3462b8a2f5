"""The distinct attention calls of one step, and how many layers make each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from slicemod.call import AttentionShape
from slicemod.planning.denoisers import find_denoiser
from slicemod.planning.layers_alike import LayersAlike
from slicemod.planning.transformers import TransformerSource
from slicemod.planning.unet_step import StepKind, trace_step

_BASE_LATENTS = 64  # what is recorded; other resolutions are scaled from it
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def record_attention_calls(source: str, *, batch: int, itemsize: int) -> list[LayersAlike]:
    """The attention of one step on 64x64 latents, largest first; no weights are loaded and no memory is taken.

    Args:
        source: as `find_denoiser` takes it.
        batch: items in the model's batch, two an image with classifier-free guidance.
        itemsize: bytes per element.

    Raises:
        UserError: there is no such model.
    """
    found, kind = find_denoiser(source), StepKind(_DTYPES[itemsize], batch, "cpu")
    pixels = _BASE_LATENTS * found.latent_pixels
    calls = trace_step(found, kind, pixels).calls
    # Some layers of a transformer look at image and text at once; what does not grow with the image is text.
    joins_text = isinstance(found, TransformerSource)
    larger = trace_step(found, kind, 2 * pixels).calls if joins_text else calls
    texts = [
        a.shape.queries - (b.shape.queries - a.shape.queries) // 3 if joins_text else 0
        for a, b in zip(calls, larger, strict=True)
    ]
    counted = Counter((_plain(call.shape), text) for call, text in zip(calls, texts, strict=True))
    found_calls = [LayersAlike(shape, layers, pixels, text) for (shape, text), layers in counted.items()]
    return sorted(found_calls, key=lambda call: (-call.shape.scores_bytes, call.shape.queries))


def _plain(shape: AttentionShape) -> AttentionShape:
    """The sizes alone; another device may compute with other settings."""
    sizes = ("batch", "heads", "queries", "keys", "head_dim", "itemsize")
    return replace(AttentionShape(*(getattr(shape, name) for name in sizes)), mask=shape.mask)
