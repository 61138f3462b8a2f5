"""The distinct attention calls of one UNet step, and how many layers make each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from slicemod.call import AttentionShape
from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.planning.unets import find_unet

_BASE_LATENTS = 64  # what is recorded; other resolutions are scaled from it
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class LayersAlike:
    """One shape of attention, how many layers of the UNet compute it, and on an image of what edge in pixels."""

    shape: AttentionShape
    layers: int
    pixels: int

    @property
    def is_self_attention(self) -> bool:
        """Queries and keys are the same tokens, and grow together with the image."""
        return self.shape.queries == self.shape.keys


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


def at_resolution(call: LayersAlike, pixels: int) -> LayersAlike:
    """The same layers on a square image of another edge, a multiple of 64 pixels."""
    queries = call.shape.queries * pixels**2 // call.pixels**2
    keys = queries if call.is_self_attention else call.shape.keys
    return LayersAlike(replace(call.shape, queries=queries, keys=keys), call.layers, pixels)
