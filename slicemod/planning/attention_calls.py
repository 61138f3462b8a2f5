"""The attention calls of one UNet step, found by running it without memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from slicemod.planning.unets import fake_inputs, fake_unet, find_unet
from slicemod.shapes import AttentionShape

_BASE_LATENTS = 64  # what is recorded; other resolutions are scaled from it


@dataclass(frozen=True)
class AttentionCall:
    """One shape of attention, how many layers of the UNet compute it, and on an image of what edge in pixels."""

    shape: AttentionShape
    layers: int
    pixels: int

    @property
    def is_self_attention(self) -> bool:
        """Queries and keys are the same tokens, and grow together with the image."""
        return self.shape.queries == self.shape.keys


class _Recorder(TorchFunctionMode):
    """Notes the sizes of every `F.scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, int, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            batch, heads, queries, head_dim = query.shape
            self.sizes.append((batch, heads, queries, key.shape[2], head_dim))
        return func(*args, **(kwargs or {}))


def record_attention_calls(source: str, *, batch: int, itemsize: int) -> list[AttentionCall]:
    """The attention of one step on 64x64 latents, largest first; no weights are loaded and no memory is taken.

    Args:
        source: as `find_unet` takes it.
        batch: items in the UNet's batch, two an image with classifier-free guidance.
        itemsize: bytes per element.

    Raises:
        UserError: there is no such model.
    """
    mode = FakeTensorMode()
    found = find_unet(source)
    unet = fake_unet(found, mode)
    recorder = _Recorder()
    with torch.no_grad(), mode, recorder:
        unet(**fake_inputs(unet, batch, _BASE_LATENTS, found.context_tokens))
    counted = Counter(
        AttentionShape(batch, heads, queries, keys, head_dim, itemsize)
        for batch, heads, queries, keys, head_dim in recorder.sizes
    )
    pixels = _BASE_LATENTS * found.latent_pixels
    calls = [AttentionCall(shape, layers, pixels) for shape, layers in counted.items()]
    return sorted(calls, key=lambda call: (-call.shape.scores_bytes, call.shape.queries))


def at_resolution(call: AttentionCall, pixels: int) -> AttentionCall:
    """The same layers on a square image of another edge, a multiple of 64 pixels."""
    queries = call.shape.queries * pixels**2 // call.pixels**2
    keys = queries if call.is_self_attention else call.shape.keys
    return AttentionCall(replace(call.shape, queries=queries, keys=keys), call.layers, pixels)
