"""A model's weights in a dtype, but for those that its library keeps in float32."""

from __future__ import annotations

import torch
from torch import nn


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model in a dtype, as `from_pretrained` loads it.

    diffusers keeps the weights that a class names in float32 where the dtype is half precision, and transformers where
    it is float16.
    """
    nn.Module.to(model, dtype)  # a model's own `to` warns of these weights
    of_diffusers = hasattr(model, "register_to_config")
    if dtype != torch.float16 and not (of_diffusers and dtype == torch.bfloat16):
        return model
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
    return model
