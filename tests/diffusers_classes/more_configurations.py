"""Small configurations of model classes of diffusers that its own tests of models leave out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import randn

from tests.diffusers_classes.configurations import Configuration

_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
}
_IMAGE_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
}
_ACE_STEP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_TIME = torch.tensor([3.0])
Made = Callable[[], dict[str, Any]]


def _image(*, channels: int = 4, size: int = 8, text: int = 16, **more: Any) -> Made:
    """Calls with an image of latents and a text."""
    return lambda: {
        "sample": randn(1, channels, size, size),
        "timestep": _TIME,
        "encoder_hidden_states": randn(1, 7, text),
        **{name: value() for name, value in more.items()},
    }


# What each class is built with, and what it is called with.
_MORE: dict[str, tuple[dict[str, Any], Made]] = {
    # UNets and ControlNets
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
    # transformers and their ControlNets
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
            "timestep": _TIME,
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
        lambda: {"hidden_states": randn(1, 4, 8, 8), "timestep": _TIME, "encoder_hidden_states": randn(1, 2, 7, 16)},
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
        lambda: {"hidden_states": randn(1, 2, 8, 8, 9), "timestep": _TIME},
    ),
    # VAEs
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
    # encoders of texts and sounds
    "AnimaTextConditioner": (
        {
            "source_dim": 16,
            "target_dim": 16,
            "model_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "target_vocab_size": 101,
            "min_sequence_length": 13,
        },
        lambda: {"source_hidden_states": randn(1, 7, 16), "target_input_ids": torch.arange(11)[None]},
    ),
    "AceStepConditionEncoder": (
        {
            **_ACE_STEP,
            "text_hidden_dim": 16,
            "timbre_hidden_dim": 8,
            "num_lyric_encoder_hidden_layers": 2,
            "num_timbre_encoder_hidden_layers": 2,
        },
        lambda: {
            "text_hidden_states": randn(1, 7, 16),
            "text_attention_mask": torch.ones(1, 7),
            "lyric_hidden_states": randn(1, 11, 16),
            "lyric_attention_mask": torch.ones(1, 11),
            "refer_audio_acoustic_hidden_states_packed": randn(1, 5, 8),
            "refer_audio_order_mask": torch.zeros(1, dtype=torch.long),
        },
    ),
    "AceStepAudioTokenDetokenizer": (
        {**_ACE_STEP, "audio_acoustic_hidden_dim": 8},
        lambda: {"hidden_states": randn(1, 7, 32)},
    ),
    "AceStepAudioTokenizer": (
        {**_ACE_STEP, "audio_acoustic_hidden_dim": 8, "fsq_dim": 32},
        lambda: {"hidden_states": randn(1, 2, 5, 8)},
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "audio_vocab_size": 31,
            "num_codebooks": 2,
        },
        lambda: {"inputs_embeds": randn(1, 7, 32)},
    ),
    "UniDiffuserTextDecoder": (
        {
            "prefix_length": 7,
            "prefix_inner_dim": 16,
            "vocab_size": 101,
            "n_positions": 31,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
        },
        lambda: {"input_ids": torch.arange(11)[None], "prefix_embeds": randn(1, 7, 16)},
    ),
    "T2IAdapter": ({"channels": [8, 16], "num_res_blocks": 1}, lambda: {"x": randn(1, 3, 32, 32)}),
    "ReduxImageEncoder": ({"redux_dim": 8, "txt_in_features": 16}, lambda: {"x": randn(1, 7, 8)}),
    "StableAudio3DurationEmbedder": ({"output_dim": 16}, lambda: {"seconds": torch.tensor([3.0])}),
    "Ideogram4PromptEnhancerHead": ({"hidden_size": 16, "vocab_size": 101}, lambda: {"hidden_states": randn(1, 7, 16)}),
    "StableAudioProjectionModel": (
        {"text_encoder_dim": 16, "conditioning_dim": 8, "min_value": 0, "max_value": 30},
        lambda: {
            "text_hidden_states": randn(1, 7, 16),
            "start_seconds": torch.tensor([3.0]),
            "end_seconds": torch.tensor([7.0]),
        },
    ),
    "AudioLDM2ProjectionModel": (
        {"text_encoder_dim": 16, "text_encoder_1_dim": 8, "langauge_model_dim": 16},
        lambda: {"hidden_states": randn(1, 7, 16), "hidden_states_1": randn(1, 5, 8)},
    ),
}

# Classes that are not called by themselves, and where their attention is called instead.
PARTS = {
    **dict.fromkeys(
        (
            "FluxMultiControlNetModel",
            "HunyuanDiT2DMultiControlNetModel",
            "MultiAdapter",
            "MultiControlNetModel",
            "QwenImageMultiControlNetModel",
            "SD3MultiControlNetModel",
        ),
        "calls others of this table",
    ),
    "MotionAdapter": "its parts are called by UNetMotionModel",
    "ControlNetXSAdapter": "its parts are called by UNetControlNetXSModel",
}


def more_configurations() -> list[Configuration]:
    """Those of classes that this version of diffusers has."""
    return [
        Configuration(name, getattr(diffusers, name), partial(dict, arguments), inputs)
        for name, (arguments, inputs) in _MORE.items()
        if hasattr(diffusers, name)
    ]
