"""The table of known layers is what the UNets ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from slicemod.planning.layers_alike import at_resolution
from slicemod.planning.model_layers import KNOWN_LAYERS, layers_of, recorded_layers

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


@pytest.mark.parametrize("model", KNOWN_LAYERS)
def test_the_table_has_what_the_unet_computes(model: str) -> None:
    known, recorded = KNOWN_LAYERS[model], recorded_layers(model)
    assert (known.pixels, known.step) == (recorded.pixels, recorded.step)
    assert set(known.layers) == {at_resolution(layer, known.pixels) for layer in recorded.layers}
    sizes = [layer.shape.scores_bytes for layer in known.layers]
    assert sizes == sorted(sizes, reverse=True)


def test_another_model_is_recorded_at_its_own_resolution() -> None:
    digits = layers_of(DIGITS)
    assert digits.pixels == 32
    assert digits.layers
