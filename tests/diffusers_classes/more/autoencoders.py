"""Small configurations of autoencoders."""

from __future__ import annotations

from typing import Any

from torch import randn

from tests.diffusers_classes.configurations import Made

_VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
}

AUTOENCODERS: dict[str, tuple[dict[str, Any], Made]] = {
    "AutoencoderKLQwenImage": (
        {
            "base_dim": 24,
            "z_dim": 4,
            "dim_mult": [1, 2, 4],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        lambda: {"sample": randn(1, 3, 1, 16, 16)},
    ),
    "AutoencoderKLFlux2": (
        {
            **_VAE,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 16,
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "AutoencoderKLHunyuanVideo15": (
        {
            "latent_channels": 4,
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 2,
            "downsample_match_channel": False,
            "upsample_match_channel": False,
        },
        lambda: {"sample": randn(1, 3, 3, 16, 16)},
    ),
    "AutoencoderKLHunyuanImageRefiner": (
        {
            "latent_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 2,
            "downsample_match_channel": False,
            "upsample_match_channel": False,
        },
        lambda: {"sample": randn(1, 3, 3, 16, 16)},
    ),
    "AutoencoderKLQwenImage21": (
        {
            "base_dim": 8,
            "decoder_base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [True],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        lambda: {"sample": randn(1, 4, 1, 16, 16)},
    ),
    "AutoencoderKLAllegro": (
        {
            "down_block_types": ("AllegroDownBlock3D",) * 4,
            "up_block_types": ("AllegroUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        lambda: {"sample": randn(1, 3, 4, 16, 16)},
    ),
    "AutoencoderRAE": (
        {
            "encoder_hidden_size": 64,
            "encoder_patch_size": 8,
            "encoder_num_hidden_layers": 1,
            "encoder_input_size": 32,
            "patch_size": 4,
            "image_size": 16,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 64,
        },
        lambda: {"sample": randn(1, 3, 32, 32)},
    ),
}
