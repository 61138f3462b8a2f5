"""The attention of a UNet is found without its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from slicemod.bench.memory import peak_memory
from slicemod.planning.attention_calls import record_attention_calls
from slicemod.user_error import UserError


def test_sd15_has_the_layers_of_its_paper() -> None:
    calls = record_attention_calls("sd15", batch=2, itemsize=2)
    self_attention = {(c.shape.queries, c.shape.head_dim): c.layers for c in calls if c.is_self_attention}
    assert self_attention == {(4096, 40): 5, (1024, 80): 5, (256, 160): 5, (64, 160): 1}
    assert all(call.shape.heads == 8 and call.shape.batch == 2 and call.pixels == 512 for call in calls)
    assert {c.shape.keys for c in calls if not c.is_self_attention} == {77}


def test_a_unet_is_recorded_without_its_memory() -> None:
    assert peak_memory(lambda: record_attention_calls("sd15", batch=1, itemsize=4)) < 2**20


def test_calls_scaled_to_a_resolution_are_those_recorded_there(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.save_pretrained(tmp_path / "unet")
    calls = record_attention_calls(str(tmp_path), batch=1, itemsize=4)
    scaled = {call.at_resolution(128).shape for call in calls}
    seen = set()
    for module in unet.modules():
        if type(module).__name__ == "Attention":
            module.register_forward_pre_hook(
                lambda attention, args, kwargs: seen.add(
                    (args[0].shape[1], attention.heads, kwargs["encoder_hidden_states"] is None)
                ),
                with_kwargs=True,
            )
    unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 77, 12))
    assert {(shape.queries, shape.heads, shape.queries == shape.keys) for shape in scaled} == seen


@pytest.mark.parametrize("source", ["sd99", "pyproject.toml", "no/such.yaml"])
def test_an_unknown_model_is_an_error_that_names_it(source: str) -> None:
    with pytest.raises(UserError, match=f"expected sd15, sd15-top, sd21, sdxl.*{source}"):
        record_attention_calls(source, batch=1, itemsize=2)


def test_a_yaml_without_a_unet_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("data: {}\n")
    with pytest.raises(UserError, match=r"other\.yaml: expected a YAML with model\.unet\.init_args"):
        record_attention_calls(str(tmp_path / "other.yaml"), batch=1, itemsize=2)
