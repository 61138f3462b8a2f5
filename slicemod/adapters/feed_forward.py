"""The feed-forwards of diffusers, CompVis LDM and Stability sgm: `FeedForward` becomes a `SlicedFeedForward`."""

from __future__ import annotations

from typing import Any

from torch import nn

from slicemod.adapters.known_code import KNOWN_ACTIVATIONS, KNOWN_FEED_FORWARDS, is_known
from slicemod.adapters.replacement import ReplacingHost
from slicemod.config import SliceConfig
from slicemod.feed_forward.layer import SlicedFeedForward
from slicemod.feed_forward.sizes import first_projection
from slicemod.swap import HOSTS


class FeedForwardHost(ReplacingHost):
    """Modules called FeedForward, whose `net` is projection with activation, dropout, and projection."""

    name = "feed-forward"
    role = "feed-forward"
    parts = ("net",)
    known = KNOWN_FEED_FORWARDS

    def matches(self, original: nn.Module) -> bool:
        """Whether the class has the name, and the module a `net` of several parts."""
        return type(original).__name__ == "FeedForward" and isinstance(
            getattr(original, "net", None), nn.ModuleList | nn.Sequential
        )

    def misfit(self, module: nn.Module) -> str | None:
        """That `net` has other parts, or parts without sizes to plan by; None if all is well."""
        net: Any = module.net
        dropouts = [part for position, part in enumerate(net) if position not in (0, 2)]
        if len(net) not in (3, 4) or not all(isinstance(part, nn.Dropout | nn.Identity) for part in dropouts):
            return f"its net is {', '.join(type(part).__name__ for part in net)}"
        if not isinstance(net[0], nn.Sequential) and not isinstance(getattr(net[0], "proj", None), nn.Module):
            return f"its first part is a {type(net[0]).__name__} without a projection"
        for projection in (first_projection(net[0]), net[2]):
            if not all(isinstance(getattr(projection, size, None), int) for size in ("in_features", "out_features")):
                return f"its projection is a {type(projection).__name__}, not a linear layer"
        return None

    def doubt(self, module: nn.Module) -> str | None:
        """That its code is not known, or that its activation may look at more than one token."""
        net: Any = module.net
        kind = type(net[0])
        if is_known(kind, KNOWN_ACTIVATIONS) or _is_projection_with_gelu(net[0]):
            return super().doubt(module)
        return f"its activation {kind.__qualname__} is not known to compute each token by itself"

    def replacement(self, original: Any, slicing: SliceConfig) -> SlicedFeedForward:
        """A SlicedFeedForward, which gets the original's `net`."""
        return SlicedFeedForward(original.net, slicing)


def _is_projection_with_gelu(part: nn.Module) -> bool:
    """As CompVis LDM makes the first part without a gate."""
    return type(part) is nn.Sequential and len(part) == 2 and type(part[1]) is nn.GELU


HOSTS.append(FeedForwardHost())
