"""Attention in a budget of 2 MiB leaves a host's peak where it is without any attention at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnProcessor
from ldm.modules.diffusionmodules.model import Decoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory
from slicemod.swap import restore_attention, swap_attention
from tests.slow_cases import slow_if

MIB = 2**20
pytestmark = pytest.mark.usefixtures("omegaconf")


@dataclass(frozen=True)
class Case:
    """A host, a call, and how many layers it attends in."""

    make: Callable[[], Any]
    call: Callable[[Any], Tensor]
    layers: int


def latents() -> Tensor:
    return torch.randn(1, 4, 32, 32)


def text() -> Tensor:
    return torch.randn(1, 77, 64)


def ldm_unet() -> Any:
    return UNetModel(
        image_size=32,
        in_channels=4,
        model_channels=64,
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=(1,),
        channel_mult=(1, 2),
        num_heads=8,
        use_spatial_transformer=True,
        context_dim=64,
        legacy=False,
    )


def ldm_decoder() -> Any:
    sizes = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (32,)}
    return Decoder(in_channels=3, resolution=64, z_channels=4, **sizes)


def diffusers_unet(kind: str = "CrossAttn", mid: str = "UNetMidBlock2DCrossAttn", **more: Any) -> Any:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=64,
        down_block_types=(f"{kind}DownBlock2D", "DownBlock2D"),
        mid_block_type=mid,
        up_block_types=("UpBlock2D", f"{kind}UpBlock2D"),
        **more,
    )


def sdxl() -> Any:
    return diffusers_unet(
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )


def control_net() -> Any:
    return ControlNetModel(
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 8),
    )


def unconditional() -> Any:
    return UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=8,
    )


def autoencoder() -> Any:
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def denoised(model: Any, **more: Any) -> Tensor:
    output: Tensor = model(latents(), 3, text(), **more).sample
    return output


def denoised_sdxl(model: Any) -> Tensor:
    return denoised(model, added_cond_kwargs={"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)})


def controlled(model: Any) -> Tensor:
    output: Tensor = model(latents(), 3, text(), torch.ones(1, 3, 64, 64)).mid_block_res_sample
    return output


CASES: dict[str, Case] = {
    "LDM UNet": Case(ldm_unet, lambda model: model(latents(), torch.tensor([3]), context=text()), 8),
    "LDM VAE": Case(ldm_decoder, lambda model: model(latents()), 3),
    "diffusers UNet": Case(diffusers_unet, denoised, 8),
    "diffusers UNet of SDXL": Case(sdxl, denoised_sdxl, 14),
    "diffusers ControlNet": Case(control_net, controlled, 4),
    "diffusers UNet, added projections": Case(
        lambda: diffusers_unet("SimpleCrossAttn", "UNetMidBlock2DSimpleCrossAttn"), denoised, 4
    ),
    "diffusers UNet without text": Case(unconditional, lambda model: model(latents(), 3).sample, 4),
    "diffusers VAE": Case(autoencoder, lambda model: model.decode(latents()).sample, 2),
}
FURTHER = {"diffusers UNet of SDXL", "diffusers UNet without text"}


class NoAttention(nn.Module):
    """Gives back what an attention layer is called with."""

    def forward(self, hidden_states: Tensor, *more: Any, **others: Any) -> Tensor:
        return hidden_states


def measured(case: Case, model: Any) -> int:
    case.call(model)
    return peak_memory(lambda: case.call(model))


@pytest.mark.parametrize("name", slow_if(FURTHER.__contains__, CASES))
@torch.no_grad()
def test_the_peak_is_that_of_the_host_without_attention(
    name: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    model = case.make()
    plain = {AttnProcessor: False, AttnAddedKVProcessor: True}
    for layer in model.modules():  # diffusers' plain attention; LDM's own is
        for processor, added in plain.items():
            if hasattr(layer, "set_processor") and (layer.add_k_proj is not None) == added:
                layer.set_processor(processor())
    full = measured(case, model)
    peaks = []
    for kernel in ("auto", "math"):
        report = swap_attention(model, {"budget": "2MiB", "policy": "exact", "kernel": kernel})
        assert len(report.layers) == case.layers
        peaks.append(measured(case, model))
    restore_attention(model)
    for found in report.layers:
        path, _, child = found.name.rpartition(".")
        setattr(model.get_submodule(path), child, NoAttention())
    without = measured(case, model)
    allowed = max(1.1 * without, without + 2 * MIB)
    capsys.readouterr()  # LDM prints what it builds
    figures = ", ".join(f"{peak / MIB:.1f}" for peak in (*peaks, without, full))
    print(f"{request.node.callspec.id}: peak in MiB, kernel auto, math; no attention, plain attention: {figures}")
    assert max(peaks) <= allowed < full
