"""The attention layers of a model, those of one shape together, at any resolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slicemod.call import AttentionShape


@dataclass(frozen=True)
class LayersAlike:
    """One shape of attention, how many layers of the model compute it, and on an image of what edge in pixels.

    Attributes:
        text_tokens: how many of the queries belong to the text; they do not grow with the image.
    """

    shape: AttentionShape
    layers: int
    pixels: int
    text_tokens: int = 0

    @property
    def is_self_attention(self) -> bool:
        """Queries and keys are the same tokens, and grow together with the image."""
        return self.shape.queries == self.shape.keys

    def at_resolution(self, pixels: int) -> LayersAlike:
        """The same layers on a square image of another edge, a multiple of 64 pixels."""
        of_image = (self.shape.queries - self.text_tokens) * pixels**2 // self.pixels**2
        shape = self.shape.with_queries(self.text_tokens + of_image)
        return replace(self, shape=shape, pixels=pixels)
