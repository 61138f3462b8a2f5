from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from slicemod.training.common.trained_weights import LoraSettings, choose_trained, trained_names
from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.training.stable_diffusion.text_encoders import load_text_encoders
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import write_tiny_model


@pytest.fixture
def source(tmp_path: Path) -> Pretrained:
    """A small random model."""
    return Pretrained(str(write_tiny_model(tmp_path / "sd15", "sd15")))


def test_full_trains_all_and_attention_its_projections(source: Pretrained) -> None:
    unet = source.load_unet()
    names = {name for name, _ in unet.named_parameters()}
    choose_trained(unet, "full", LoraSettings(), seed=0)
    assert trained_names(unet) == names
    choose_trained(unet, "attention", LoraSettings(), seed=0)
    chosen = trained_names(unet)
    assert {name.split(".")[-2] for name in chosen if "to_out" not in name} == {"to_q", "to_k", "to_v"}
    assert len(chosen) == 2 * 5 * len(
        {name.split(".attn")[0] for name in chosen}
    )  # two of each block; to_out has a bias


def test_a_package_that_is_missing_is_named(source: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    unet = source.load_unet()
    with pytest.raises(UserError, match="needs the package peft, which is not installed"):
        choose_trained(unet, "lora", LoraSettings(), seed=0)
    with pytest.raises(UserError, match="needs the package transformers, which is not installed"):
        load_text_encoders(source)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "model.lora.rank must be at least 1, got 0"),
        ({"alpha": float("nan")}, "model.lora.alpha must be a number above 0, got nan"),
        ({"alpha": float("inf")}, "model.lora.alpha must be a number above 0, got inf"),
        ({"alpha": -2.0}, "model.lora.alpha must be a number above 0, got -2.0"),
        ({"targets": []}, "model.lora.targets must name a layer"),
        ({"dropout": 1.0}, "model.lora.dropout must be from 0 to below 1"),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        LoraSettings(**settings)
