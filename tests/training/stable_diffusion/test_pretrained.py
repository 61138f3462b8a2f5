from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slicemod.training.common.checkpoints import read_safetensors, write_safetensors
from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.training.stable_diffusion.text_encoders import load_text_encoders
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import whole_model


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_are_not_made_up(part: str, tmp_path: Path) -> None:
    pretrained = Pretrained(str(whole_model(tmp_path, "sd15")))
    (file,) = (tmp_path / part).glob("*.safetensors")
    tensors, metadata = read_safetensors(file)
    missing = sorted(tensors)[3]
    del tensors[missing]
    write_safetensors(file, tensors, metadata)
    load = {"unet": pretrained.load_unet, "vae": pretrained.load_autoencoder}.get(
        part, lambda: load_text_encoders(pretrained)
    )
    with pytest.raises(UserError, match=rf"\({part}/\) lacks 1 of the weights .* {missing}"):
        load()


def test_weights_of_half_precision_are_read_in_float32(tmp_path: Path) -> None:
    pretrained = Pretrained(str(whole_model(tmp_path, "sd15")))
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        tensors, metadata = read_safetensors(file)
        write_safetensors(file, {name: tensor.half() for name, tensor in tensors.items()}, metadata)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    for module in (pretrained.load_unet(), pretrained.load_autoencoder(), load_text_encoders(pretrained)):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("text_encoder/model.safetensors", "text_encoder/model.safetensors cannot be read as safetensors"),
        ("text_encoder/config.json", r"\(text_encoder/\) cannot be read"),
        ("tokenizer/vocab.json", r"\(tokenizer/\) cannot be read"),
    ],
)
def test_a_part_of_the_text_that_is_cut_short_is_named(file: str, named: str, tmp_path: Path) -> None:
    damaged = whole_model(tmp_path, "sd15") / file
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(UserError, match=named):
        load_text_encoders(Pretrained(str(tmp_path)))


def test_what_stands_for_no_text_is_what_the_pipeline_says(tmp_path: Path) -> None:
    pretrained = Pretrained(str(whole_model(tmp_path, "sdxl")))
    assert pretrained.zeroes_missing_text()
    for said, wanted in (({}, True), ({"force_zeros_for_empty_prompt": False}, False)):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **said}))
        assert pretrained.zeroes_missing_text() == wanted
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"\(model_index.json\) cannot be read"):
        pretrained.zeroes_missing_text()
