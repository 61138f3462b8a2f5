"""Whole pipelines of diffusers, small and random: text encoder, UNet, scheduler and VAE give the same picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from slicemod.swap import restore_attention, swap_attention
from tests.oracle import with_random_weights

transformers = pytest.importorskip("transformers", reason="the pipelines' text encoders are of transformers")

MATH: dict[str, Any] = {"kernel": "math", "budget": "64KiB", "policy": "exact"}
TOKENS = 17
TEXT_WIDTH = 32


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """CLIP's tokenizer with letters for a vocabulary."""
    letters = [chr(ord("a") + index) for index in range(26)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(tmp_path, model_max_length=TOKENS)


def text_encoder(tokenizer: Any, kind: str) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def vae() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4}
    return with_random_weights(AutoencoderKL(**blocks, **sizes)).eval()


def unet(**config: Any) -> Any:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        **config,
    )
    return with_random_weights(model).eval()


def stable_diffusion(tokenizer: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(tokenizer, "CLIPTextModel"),
        tokenizer=tokenizer,
        unet=unet(cross_attention_dim=TEXT_WIDTH),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(tokenizer: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(tokenizer, "CLIPTextModel"),
        text_encoder_2=text_encoder(tokenizer, "CLIPTextModelWithProjection"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            cross_attention_dim=2 * TEXT_WIDTH,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def picture(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    drawn: Tensor = pipeline(
        "a cat",
        negative_prompt="a dog",
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        height=16,
        width=16,
        output_type="pt",
    ).images
    return drawn


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl], ids=["SD", "SDXL"])
def test_a_pipeline_with_its_unet_and_vae_swapped_draws_the_same(make: Any, tokenizer: Any) -> None:
    pipeline = make(tokenizer)
    expected = picture(pipeline)
    assert expected.shape == (1, 3, 16, 16)
    assert float(expected.std()) > 0.01
    reports = [swap_attention(model, MATH) for model in (pipeline.unet, pipeline.vae)]
    torch.testing.assert_close(picture(pipeline), expected, rtol=1e-3, atol=1e-4)
    decoder_plans = [layer.plan for layer in reports[1].layers if layer.name.startswith("decoder")]
    assert all(plan is not None for plan in (*decoder_plans, *(layer.plan for layer in reports[0].layers)))
    restore_attention(pipeline.unet)
    restore_attention(pipeline.vae)
    assert torch.equal(picture(pipeline), expected)
