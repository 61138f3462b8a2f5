"""Small configurations of encoders of texts and sounds, and of other parts of pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import randn

from tests.diffusers_classes.configurations import Made

_ACE_STEP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

ENCODERS: dict[str, tuple[dict[str, Any], Made]] = {
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
