"""A model is found by name, by a config or by a folder, and what is none is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.planning.unets import UnetSource, find_unet, meta_inputs, meta_unet
from slicemod.user_error import UserError

CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
KIND = StepKind(torch.float32, 1, "cpu")


def test_a_folder_of_diffusers_is_the_model_that_was_saved(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**CONFIG)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [4, 4, 8]}))
    pipeline, folder = find_unet(str(tmp_path)), find_unet(str(tmp_path / "unet"))
    assert pipeline == folder
    assert (pipeline.latent_pixels, pipeline.context_tokens, pipeline.resolution_step) == (4, 77, 8)
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    assert trace_step(pipeline, KIND, 128).timeline.weights == weights


def test_a_config_of_this_repository_is_planned_with_its_own_pixels_a_latent() -> None:
    source = find_unet("configs/digits.yaml")
    assert (source.latent_pixels, source.context_tokens, source.resolution_step) == (4, 1, 8)
    calls = trace_step(source, KIND, 512).calls
    assert max(call.shape.queries for call in calls) == (512 // 4 // 2) ** 2  # attention starts one level down


def test_a_model_with_class_labels_is_traced() -> None:
    source = UnetSource(CONFIG | {"num_class_embeds": 5}, 8, 77)
    assert trace_step(source, KIND, 128).layers == trace_step(source._replace(config=CONFIG), KIND, 128).layers


@pytest.mark.parametrize("source", ["sd99", "pyproject.toml", "no/such.yaml"])
def test_an_unknown_model_is_an_error_that_names_it(source: str) -> None:
    with pytest.raises(UserError, match=f"expected sd15, sd15-top, sd21, sdxl.*{source}"):
        find_unet(source)


def test_a_yaml_without_a_unet_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match=r"digits_finetune\.yaml: expected a YAML with model\.unet\.init_args"):
        find_unet("configs/digits_finetune.yaml")


def test_a_folder_of_another_model_is_an_error_that_names_its_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(UserError, match=r"expected the config\.json of a UNet2DConditionModel; got one of Flux"):
        find_unet(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected JSON, as diffusers writes it"),
        ("[]", "expected the JSON of a dict; got a list"),
        ('{"block_out_channels": 4}', "expected a list with an entry for each level in block_out_channels; got 4"),
        ("[" * 100_000, "expected JSON, as diffusers writes it"),
    ],
)
def test_a_broken_config_of_the_unet_or_the_autoencoder_is_named(tmp_path: Path, content: str, said: str) -> None:
    unet, vae = tmp_path / "unet" / "config.json", tmp_path / "vae" / "config.json"
    for file in (unet, vae):
        file.parent.mkdir()
    unet.write_text(json.dumps(CONFIG))
    vae.write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(vae))}: {said}"):
        find_unet(str(tmp_path))
    if "block_out_channels" not in content:
        unet.write_text(content)
        with pytest.raises(UserError, match=f"{re.escape(str(unet))}: {said}"):
            find_unet(str(tmp_path))


def test_an_autoencoder_without_levels_in_a_yaml_has_those_of_its_class(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(json.dumps({"model": {name: {"init_args": {}} for name in ("unet", "autoencoder")}}))
    assert find_unet(str(file)).latent_pixels == 1


def test_arguments_that_build_no_unet_are_an_error() -> None:
    with pytest.raises(UserError, match="describes no UNet2DConditionModel"):
        meta_unet(UnetSource(CONFIG | {"down_block_types": ("NoBlock2D",)}, 8, 77), torch.float32)


def test_another_conditioning_is_an_error_that_names_it() -> None:
    config = CONFIG | {"class_embed_type": "timestep"}
    unet = meta_unet(UnetSource(config, 8, 77), torch.float32)
    with pytest.raises(UserError, match="got class_embed_type='timestep'"):
        meta_inputs(unet, torch.float32, 1, 16, 77)
