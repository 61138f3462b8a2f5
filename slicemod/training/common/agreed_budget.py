"""One budget for all processes of a training: their plans agree, whatever each has free."""

from __future__ import annotations

import torch
from torch import distributed, nn

from slicemod import SliceConfig, swap_attention


def agree_on_budget(model: nn.Module, attention: SliceConfig | None, device: torch.device) -> None:
    """Gives the swapped layers of `model` the smallest budget of all processes; all of them have to call it.

    A process alone goes on reading its free memory for every plan.
    """
    if attention is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        swap_attention(model, attention.resolved(device))
