"""Which weights of a UNet are trained: all, those of its attention, or low-rank adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from slicemod.user_error import UserError

Trained = Literal["full", "attention", "lora"]
ADAPTER = "default"  # peft's name for the first adapter


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), made by peft."""

    rank: int = 16
    """Of each adapter's two matrices."""
    alpha: float = 16.0
    """The adapter's product is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Ends of the names of the layers that get an adapter."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"model.lora.rank must be at least 1, got {self.rank}: 4 to 64 are usual.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"model.lora.alpha must be a number above 0, got {self.alpha}: the rank is usual.")
        if not self.targets:
            raise UserError("model.lora.targets must name a layer, got none: to_q, to_k, to_v, to_out.0 are usual.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout must be from 0 to below 1, got {self.dropout}: give a share.")


def choose_trained(unet: Any, trained: Trained, lora: LoraSettings, *, seed: int) -> None:
    """Sets ``requires_grad`` of every parameter, after adding the adapters where ``trained`` is "lora".

    Args:
        unet: a diffusers UNet, changed in place.
        trained: "full"; "attention", the projections of self- and cross-attention; "lora".
        lora: of the adapters, which are float32.
        seed: of the adapters' first values; their products are zero at first, whatever the seed.

    Raises:
        UserError: peft is not installed, or the targets name no layer.
    """
    unet.requires_grad_(trained == "full")
    if trained == "attention":
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(any(part in ("attn1", "attn2") for part in name.split(".")))
    elif trained == "lora":
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UserError(
                "model.trained: lora needs the package peft, which is not installed: pip install 'slicemod[train]'."
            ) from error
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.targets),
            lora_dropout=lora.dropout,
            init_lora_weights="gaussian",
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                unet.add_adapter(settings, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(
                f"model.lora.targets: expected ends of names of the UNet's layers, got {', '.join(lora.targets)}."
                f" {error} Correct the names."
            ) from error
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
