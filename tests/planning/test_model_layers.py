"""The table of known layers is what the UNets ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slicemod.planning.model_layers import KNOWN_LAYERS, layers_of, recorded_layers
from slicemod.user_error import UserError

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


@pytest.mark.parametrize("model", KNOWN_LAYERS)
def test_the_table_has_what_the_unet_computes(model: str) -> None:
    known, recorded = KNOWN_LAYERS[model], recorded_layers(model)
    assert (known.pixels, known.step) == (recorded.pixels, recorded.step)
    assert set(known.layers) == {layer.at_resolution(known.pixels) for layer in recorded.layers}
    sizes = [layer.shape.scores_bytes for layer in known.layers]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("sizes", "pixels"), [({"sample_size": 24}, 192), ({"sample_size": None}, 512), ({}, 512)])
def test_a_folder_need_not_say_its_resolution(sizes: dict[str, int | None], pixels: int, tmp_path: Path) -> None:
    config = {"block_out_channels": [32, 64], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    config |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    assert layers_of(str(tmp_path)).pixels == pixels


def test_a_model_without_attention_is_refused_by_name(tmp_path: Path) -> None:
    config = {"block_out_channels": [32], "up_block_types": ["UpBlock2D"], "down_block_types": ["DownBlock2D"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"mid_block_type": None}))
    with pytest.raises(UserError, match=f"expected one that computes attention; got '{tmp_path}'"):
        layers_of(str(tmp_path))


def test_another_model_is_recorded_at_its_own_resolution() -> None:
    digits = layers_of(DIGITS)
    assert digits.pixels == 32
    assert digits.layers


def test_a_transformer_is_recorded_with_its_text() -> None:
    flux = layers_of("flux-schnell")
    (layers,) = flux.layers
    assert (flux.guidance_batch, layers.layers, layers.text_tokens) == (1, 57, 512)
    assert layers.at_resolution(1024).shape.queries == 512 + (1024 // 16) ** 2
