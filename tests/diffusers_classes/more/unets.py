"""Small configurations of UNets and their ControlNets."""

from __future__ import annotations

from typing import Any

import torch
from torch import randn

from tests.diffusers_classes.configurations import TIME, Made

_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
}


def _image(*, channels: int = 4, size: int = 8, text: int = 16, **more: Any) -> Made:
    """Calls with an image of latents and a text."""
    return lambda: {
        "sample": randn(1, channels, size, size),
        "timestep": TIME,
        "encoder_hidden_states": randn(1, 7, text),
        **{name: value() for name, value in more.items()},
    }


UNETS: dict[str, tuple[dict[str, Any], Made]] = {
    "ControlNetModel": (
        {**_UNET, "conditioning_embedding_out_channels": (8, 8)},
        _image(controlnet_cond=lambda: randn(1, 3, 16, 16)),
    ),
    "ControlNetUnionModel": (
        {
            **_UNET,
            "conditioning_embedding_out_channels": (8, 8),
            "num_trans_channel": 8,
            "num_trans_head": 2,
            "num_proj_channel": 8,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        _image(
            controlnet_cond=lambda: [randn(1, 3, 16, 16)],
            control_type=lambda: torch.tensor([[1.0, 0, 0, 0, 0, 0]]),
            control_type_idx=lambda: [0],
            added_cond_kwargs=lambda: {"text_embeds": randn(1, 16), "time_ids": torch.ones(1, 6)},
        ),
    ),
    "SparseControlNetModel": (
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "conditioning_channels": 3,
            "conditioning_embedding_out_channels": (8, 8),
            "use_simplified_condition_embedding": False,
            "motion_num_attention_heads": 2,
            "attention_head_dim": 4,
        },
        lambda: {
            "sample": randn(1, 4, 3, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": randn(3, 7, 16),  # for each frame
            "controlnet_cond": randn(1, 3, 3, 16, 16),
            "conditioning_mask": torch.ones(1, 1, 3, 16, 16),
        },
    ),
    "AudioLDM2UNet2DConditionModel": (
        {**_UNET, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": (16, 16)},
        _image(encoder_hidden_states_1=lambda: randn(1, 5, 16)),
    ),
    "I2VGenXLUNet": (
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
        },
        lambda: {
            "sample": randn(1, 4, 3, 8, 8),
            "timestep": TIME,
            "fps": torch.tensor([8.0]),
            "image_latents": randn(1, 4, 3, 8, 8),
            "image_embeddings": randn(1, 16),
            "encoder_hidden_states": randn(1, 7, 16),
        },
    ),
    "Kandinsky3UNet": (
        {
            "time_embedding_dim": 4,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 4,
            "encoder_hid_dim": 16,
        },
        _image(encoder_attention_mask=lambda: torch.tensor([[1.0, 1, 1, 1, 1, 0, 0]])),
    ),
    "StableCascadeUNet": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": 16,
            "clip_seq": 4,
        },
        lambda: {
            "sample": randn(1, 4, 8, 8),
            "timestep_ratio": torch.tensor([0.3]),
            "clip_text_pooled": randn(1, 1, 16),
        },
    ),
    "UVit2DModel": (
        {
            "hidden_size": 16,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 2,
            "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 16,
            "vocab_size": 32,
            "codebook_size": 31,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 8,
        },
        lambda: {
            "input_ids": torch.randint(0, 31, (1, 8, 8)),
            "encoder_hidden_states": randn(1, 7, 16),
            "pooled_text_emb": randn(1, 16),
            "micro_conds": torch.ones(1, 5),
        },
    ),
    "Transformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
        },
        lambda: {"hidden_states": randn(1, 16, 8, 8), "encoder_hidden_states": randn(1, 7, 16)},
    ),
    "DreamLiteTransformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
        },
        lambda: {"hidden_states": randn(1, 16, 8, 8), "encoder_hidden_states": randn(1, 7, 16)},
    ),
}
