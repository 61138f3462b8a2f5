"""Attention layers of unknown classes that are made and called as CrossAttention is, where `filter_fn` chooses them."""

from __future__ import annotations

from torch import nn

from slicemod.adapters.compvis import CrossAttentionHost, has_parts
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.swap import HOSTS


class LookalikeHost(CrossAttentionHost):
    """Whatever has `to_q`, `to_k`, `to_v`, `to_out` and `heads`, and is no layer of another host."""

    name = "lookalikes"

    def matches(self, original: nn.Module) -> bool:
        """Not one of ours, with the projections and a number of heads."""
        return not isinstance(original, MemoryAwareCrossAttention) and has_parts(original)

    def doubt(self, module: nn.Module) -> str:
        """That nothing is known of it."""
        return f"{type(module).__name__} only looks like attention"


HOSTS.append(LookalikeHost())
