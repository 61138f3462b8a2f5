"""Small configurations of transformers and their ControlNets."""

from __future__ import annotations

from typing import Any

import torch
from torch import randn

from tests.diffusers_classes.configurations import TIME, Made

_IMAGE_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
}

TRANSFORMERS: dict[str, tuple[dict[str, Any], Made]] = {
    "FluxControlNetModel": (
        {
            **_IMAGE_TRANSFORMER,
            "in_channels": 4,
            "num_single_layers": 1,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [2, 2, 4],
        },
        lambda: {
            "hidden_states": randn(1, 11, 4),
            "controlnet_cond": randn(1, 11, 4),
            "encoder_hidden_states": randn(1, 7, 32),
            "pooled_projections": randn(1, 32),
            "timestep": TIME,
            "img_ids": torch.ones(11, 3),
            "txt_ids": torch.ones(7, 3),
        },
    ),
    "SD3ControlNetModel": (
        {
            **_IMAGE_TRANSFORMER,
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 24,
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "controlnet_cond": randn(1, 4, 8, 8),
            "encoder_hidden_states": randn(1, 7, 32),
            "pooled_projections": randn(1, 24),
            "timestep": TIME,
        },
    ),
    "QwenImageControlNetModel": (
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": randn(1, 16, 16),
            "controlnet_cond": randn(1, 16, 16),
            "encoder_hidden_states": randn(1, 7, 16),
            "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
            "timestep": TIME,
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "SanaControlNetModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "controlnet_cond": randn(1, 4, 8, 8),
            "encoder_hidden_states": randn(1, 7, 8),
            "timestep": TIME,
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "rope_axes_dim": (4, 4),
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": randn(1, 7, 32),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        },
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (1, 1, 2),
        },
        lambda: {
            "hidden_states": randn(1, 2, 8, 8, 4),
            "encoder_hidden_states": randn(1, 7, 16),
            "timestep": TIME,
            "pooled_projections": randn(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(7),
        },
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (2, 2, 4),
            "visual_cond": False,
        },
        lambda: {
            "hidden_states": randn(1, 2, 8, 8, 4),
            "encoder_hidden_states": randn(1, 7, 16),
            "pooled_projections": randn(1, 8),
            "timestep": TIME,
            "audio_hidden_states": randn(1, 5, 20),
        },
    ),
    "Flux3Transformer2DModel": (
        {
            **_IMAGE_TRANSFORMER,
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_single_layers": 1,
            "axes_dims_rope": (2, 2, 2, 2),
            "timestep_channels": 32,
        },
        lambda: {
            "hidden_states": randn(1, 11, 4),
            "encoder_hidden_states": randn(1, 7, 32),
            "timestep": TIME,
            "img_ids": torch.ones(11, 4),
            "txt_ids": torch.ones(7, 4),
        },
    ),
    "QwenImage21Transformer2DModel": (
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "context_in_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": randn(1, 16, 16),
            "encoder_hidden_states": randn(1, 7, 16),
            "timestep": TIME,
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 7 + [True] * 4]),  # a slot of the text's model stands for 4 tokens
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 4,
            "in_channels": 3,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 3,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 16,
        },
        lambda: {
            "hidden_states": randn(1, 3, 11),
            "timestep": TIME,
            "encoder_hidden_states": randn(1, 7, 16),
            "global_hidden_states": randn(1, 1, 8),
            "rotary_embedding": (randn(12, 4), randn(12, 4)),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 8, "targets_length": 11, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda: {
            "encodings_and_masks": [(randn(1, 7, 16), torch.ones(1, 7))],
            "decoder_input_tokens": randn(1, 11, 8),
            "decoder_noise_time": torch.tensor([0.3]),
        },
    ),
    "HunyuanDiT2DControlNetModel": (
        {
            "sample_size": 8,
            "transformer_num_layers": 4,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 24,
            "text_len": 4,
            "text_len_t5": 4,
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "controlnet_cond": randn(1, 4, 8, 8),
            "encoder_hidden_states": randn(1, 4, 8),
            "text_embedding_mask": torch.ones(1, 4),
            "encoder_hidden_states_t5": randn(1, 4, 8),
            "text_embedding_mask_t5": torch.ones(1, 4),
            "timestep": TIME,
            "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]]),
            "style": torch.zeros(1, dtype=torch.long),
            "image_rotary_emb": (torch.ones(1, 8), torch.zeros(1, 8)),
        },
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_dims": (2, 2, 4),
            "axes_lens": (64, 32, 32),
        },
        lambda: {"hidden_states": randn(1, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": randn(1, 2, 7, 16)},
    ),
    "Kandinsky6SRTransformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        lambda: {"hidden_states": randn(1, 2, 8, 8, 9), "timestep": TIME},
    ),
}
