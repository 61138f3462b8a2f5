"""Layers of unknown classes that are built and called like CrossAttention. `filter_fn` has to choose them."""

from __future__ import annotations

from torch import nn

from slicemod.adapters.compvis import CrossAttentionHost, has_parts
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.swap import HOSTS


class LookalikeHost(CrossAttentionHost):
    """Modules with `to_q`, `to_k`, `to_v`, `to_out` and `heads`."""

    name = "lookalikes"

    def matches(self, original: nn.Module) -> bool:
        """Whether the module has the projections and a number of heads, and is not slicemod's."""
        return not isinstance(original, MemoryAwareCrossAttention) and has_parts(original)

    def doubt(self, module: nn.Module) -> str:
        """That nothing is known of the class."""
        return f"{type(module).__name__} only looks like attention"


HOSTS.append(LookalikeHost())
