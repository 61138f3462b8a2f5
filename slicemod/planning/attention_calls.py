"""The distinct attention calls of one UNet step, and how many layers make each."""

from __future__ import annotations

from collections import Counter

import torch

from slicemod.call import AttentionShape
from slicemod.planning.layers_alike import LayersAlike
from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.planning.unets import find_unet

_BASE_LATENTS = 64  # what is recorded; other resolutions are scaled from it
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def record_attention_calls(source: str, *, batch: int, itemsize: int) -> list[LayersAlike]:
    """The attention of one step on 64x64 latents, largest first; no weights are loaded and no memory is taken.

    Args:
        source: as `find_unet` takes it.
        batch: items in the UNet's batch, two an image with classifier-free guidance.
        itemsize: bytes per element.

    Raises:
        UserError: there is no such model.
    """
    found = find_unet(source)
    pixels = _BASE_LATENTS * found.latent_pixels
    calls = trace_step(found, StepKind(_DTYPES[itemsize], batch, "cpu"), pixels).calls
    sizes = ("batch", "heads", "queries", "keys", "head_dim", "itemsize")
    counted = Counter(AttentionShape(*(getattr(call.shape, name) for name in sizes)) for call in calls)
    found_calls = [LayersAlike(shape, layers, pixels) for shape, layers in counted.items()]
    return sorted(found_calls, key=lambda call: (-call.shape.scores_bytes, call.shape.queries))
