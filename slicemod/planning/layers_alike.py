"""The attention layers of a UNet, those of one shape together, at any resolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slicemod.call import AttentionShape


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


def at_resolution(call: LayersAlike, pixels: int) -> LayersAlike:
    """The same layers on a square image of another edge, a multiple of 64 pixels."""
    queries = call.shape.queries * pixels**2 // call.pixels**2
    keys = queries if call.is_self_attention else call.shape.keys
    return LayersAlike(replace(call.shape, queries=queries, keys=keys), call.layers, pixels)
