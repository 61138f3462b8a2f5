from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from ldm.modules.diffusionmodules.openaimodel import UNetModel

from slicemod.training.stable_diffusion.compvis_layout import (
    SD1_TEXT,
    SDXL_TEXT,
    UNET,
    autoencoder_to_compvis,
    text_encoders_to_compvis,
    unet_to_compvis,
)
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import clip_tensors, write_tiny_model


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_diffusers_reads_back_the_unet_and_the_autoencoder(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, kind)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    file = unet_to_compvis(unet.state_dict(), unet.config)
    assert_same(convert_ldm_unet_checkpoint(file, unet.config), unet.state_dict())
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    file = autoencoder_to_compvis(autoencoder.state_dict(), autoencoder.config)
    assert_same(convert_ldm_vae_checkpoint(file, autoencoder.config), autoencoder.state_dict())


def test_the_names_are_those_of_compvis_own_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    listconfig: Any = ModuleType("omegaconf.listconfig")  # what the UNet asks about is whether context_dim is one
    listconfig.ListConfig = tuple
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.listconfig", listconfig)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    theirs = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1, 2],
        num_res_blocks=2, channel_mult=[1, 2, 2], num_heads=4, use_spatial_transformer=True, transformer_depth=1,
        context_dim=24, use_checkpoint=False, legacy=False,
    )  # fmt: skip
    ours = {name.removeprefix(UNET): tensor for name, tensor in unet_to_compvis(unet.state_dict(), unet.config).items()}
    theirs.load_state_dict(ours)
    latents, context, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.tensor([3, 500])
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(latents, timesteps, context), unet.eval()(latents, timesteps, context).sample,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_sd1s_text_encoder_keeps_its_names_under_a_prefix() -> None:
    tensors = clip_tensors(2, 6)
    written = text_encoders_to_compvis(
        [{f"text_model.{name}": tensor for name, tensor in tensors.items()}], openclip=False
    )
    assert all(name.startswith(SD1_TEXT) for name in written)
    assert_same(
        convert_ldm_clip_checkpoint(written), {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    )
    assert_same(text_encoders_to_compvis([tensors], openclip=False), written)  # as newer transformers name them


@pytest.mark.parametrize("encoders", [1, 2])
def test_open_clips_text_encoder_is_read_back_by_diffusers(encoders: int) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    tensors = {f"text_model.{name}": tensor for name, tensor in clip_tensors(2, 6).items()}
    prefix: Any = "cond_stage_model.model."
    given = [tensors]
    if encoders == 2:
        tensors["text_projection.weight"] = torch.randn(6, 6)
        given, prefix = [clip_tensors(1, 4), tensors], SDXL_TEXT[1]
    written = text_encoders_to_compvis(given, openclip=True)
    text_model = type("Model", (), {"config": type("Config", (), {"hidden_size": 6})})
    assert_same(convert_open_clip_checkpoint(text_model, written, prefix=prefix), tensors)


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(UserError, match=r"encoder_hid_proj\.weight has no place"):
        unet_to_compvis({"encoder_hid_proj.weight": torch.zeros(1)}, {"layers_per_block": 2})
