"""Low-rank adapters as the one file that diffusers and webuis read: kohya's names, with metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slicemod.training.common.checkpoints import CheckpointError, write_safetensors
from slicemod.training.common.trained_weights import ADAPTER

_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def kohya_tensors(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """peft's adapters of a UNet under kohya's names.

    Args:
        state: a fine-tuning's trained weights, ``unet.<layer>.lora_A.default.weight`` and ``lora_B``.
        alpha: the adapters' products are scaled by ``alpha / rank``.

    Raises:
        CheckpointError: there are other weights than adapters.

    >>> names = [f"unet.mid.attn1.to_q.lora_{part}.default.weight" for part in "AB"]
    >>> sorted(kohya_tensors(dict.fromkeys(names, torch.zeros(2, 2)), 4.0))[0]
    'lora_unet_mid_attn1_to_q.alpha'
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, part = name.removesuffix(f".{ADAPTER}.weight").rpartition(".")
        if part not in _PARTS or not layer.startswith("unet."):
            raise CheckpointError(
                f"the checkpoint holds {name}, which is no low-rank adapter: expected a run with model.trained: lora."
                " Export it as diffusers or compvis."
            )
        stem = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        converted[f"{stem}.{_PARTS[part]}.weight"] = tensor
        converted[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return converted


def write_lora(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], settings: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes the adapters of a fine-tuning.

    Args:
        path: the ``.safetensors`` file.
        state: its trained weights.
        settings: fields of ``LoraSettings``.
        metadata: of the file, beside rank, alpha and kind of model as kohya names them.

    Raises:
        CheckpointError: there are other weights than adapters.
        UserError: the file cannot be written.
    """
    own = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings["rank"]),
        "ss_network_alpha": str(settings["alpha"]),
    }
    write_safetensors(path, kohya_tensors(state, settings["alpha"]), {**metadata, **own})
