"""The attention layers of a model: of SD1.5 and SDXL from a table, of any other as its UNet is run without memory."""

from __future__ import annotations

from typing import NamedTuple

from slicemod.call import AttentionShape
from slicemod.planning.layers_alike import LayersAlike
from slicemod.user_error import UserError


class ModelLayers(NamedTuple):
    """The attention layers of a model, for one image in float32.

    Attributes:
        pixels: edge of the images that it was trained on; where that is not known, of 64 x 64 latents.
        step: edges that it takes are multiples of this.
        layers: those alike together, largest first.
        guidance_batch: items of a call for one image in inference.
    """

    pixels: int
    step: int
    layers: tuple[LayersAlike, ...]
    guidance_batch: int = 2


def _of_stable_diffusion(pixels: int, step: int, *rows: tuple[int, int, int, int, int]) -> ModelLayers:
    layers = [
        LayersAlike(AttentionShape(1, heads, queries, keys, channels, 4), count, pixels)
        for count, heads, queries, keys, channels in rows
    ]
    return ModelLayers(pixels, step, tuple(layers))


# As recorded from the UNets, which takes diffusers, and seconds to load it: tests hold the two together. A row is how
# many layers there are, heads, queries, keys, channels of a head.
KNOWN_LAYERS = {
    "sd15": _of_stable_diffusion(
        512,
        64,
        (5, 8, 4096, 4096, 40),
        (5, 8, 1024, 1024, 80),
        (5, 8, 4096, 77, 40),
        (5, 8, 1024, 77, 80),
        (5, 8, 256, 256, 160),
        (5, 8, 256, 77, 160),
        (1, 8, 64, 77, 160),
        (1, 8, 64, 64, 160),
    ),
    "sdxl": _of_stable_diffusion(
        1024,
        32,
        (10, 10, 4096, 4096, 64),
        (60, 20, 1024, 1024, 64),
        (10, 10, 4096, 77, 64),
        (60, 20, 1024, 77, 64),
    ),
}


def layers_of(model: str) -> ModelLayers:
    """The layers of a model, as `find_denoiser` takes it.

    Raises:
        UserError: there is no such model.
    """
    return KNOWN_LAYERS[model] if model in KNOWN_LAYERS else recorded_layers(model)


def recorded_layers(model: str) -> ModelLayers:
    """`layers_of`, by running the model.

    Raises:
        UserError: there is no such model, or it has no attention.
    """
    from slicemod.planning.attention_calls import record_attention_calls
    from slicemod.planning.denoisers import find_denoiser

    source = find_denoiser(model)
    layers = tuple(record_attention_calls(model, batch=1, itemsize=4))
    if not layers:
        raise UserError(
            f"model: expected one that computes attention; got {model!r}, which has none. Name another one."
        )
    return ModelLayers(source.own_pixels or layers[0].pixels, source.resolution_step, layers, source.guidance_batch)
