"""Random weights for the models of programs, which leave theirs as they are allocated."""

from __future__ import annotations

from typing import Any

from torch import nn


def randomized(model: nn.Module) -> Any:
    """The model, ready for inference, with weights that keep the size of what goes through them."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
    return model.eval().float()
