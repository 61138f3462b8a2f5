"""The VAE's attention in CompVis LDM and Stability sgm: one head over all pixels of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from slicemod.adapters.known_code import forward_methods
from slicemod.adapters.own_code import names_in
from slicemod.adapters.replacement import ReplacingHost
from slicemod.attend import attend
from slicemod.config import SliceConfig
from slicemod.plan import SlicePlan
from slicemod.swap import HOSTS

_CLASSES = ("AttnBlock", "MemoryEfficientAttnBlock", "SpatialSelfAttention")
_PARTS = ("norm", "q", "k", "v", "proj_out")


class MemoryAwareAttnBlock(nn.Module):
    """`x + proj_out(attention(q(norm(x)), k(norm(x)), v(norm(x))))`, in which every pixel attends to all pixels.

    Args:
        in_channels: channels `C`, a multiple of 32. They are also the width of the only head.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.

    >>> import torch
    >>> MemoryAwareAttnBlock(32)(torch.zeros(1, 32, 5, 7)).shape
    torch.Size([1, 32, 5, 7])
    """

    def __init__(self, in_channels: int, slicing: SliceConfig | Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.slicing = SliceConfig.of(slicing)
        self.plan: SlicePlan | None = None  # of the last eager call
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(in_channels, in_channels, 1) for _ in range(4))

    def forward(self, x: Tensor, **_unused: Any) -> Tensor:
        """Compute the block.

        Args:
            x: `(B, C, height, width)`, or for a video `(B, C, frames, height, width)`. Then the pixels of all frames
                attend to each other.
            _unused: arguments that the decoders of Stability sgm pass to every block.

        Returns:
            A tensor with the sizes of `x`.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
        """
        return attended_block(self, x, lambda q, k, v: attend(self, q, k, v, None, self.in_channels**-0.5))

    def extra_repr(self) -> str:
        """Sizes, slicing and the last plan, in the module's `repr`."""
        plan = "" if self.plan is None else f", plan: {self.plan}"
        return f"in_channels={self.in_channels}, {self.slicing}{plan}"


def attended_block(block: Any, x: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """`x + proj_out(attention(q(norm(x)), k(norm(x)), v(norm(x))))` of a block.

    Args:
        block: has these parts.
        x: `(B, C, ...)`.
        attention: of query, key and value of all pixels, `(B, 1, N, C)`.
    """
    normed = block.norm(x)
    query, key, value = (
        rearrange(projected, "b c ... -> b 1 (...) c")
        for projected in (block.q(normed), block.k(normed), block.v(normed))
    )
    del normed
    output = attention(query, key, value)
    del query, key, value
    output = rearrange(output, "b 1 n c -> b c n")
    output = output.view(*output.shape[:2], *x.shape[2:])
    out: Tensor = x + block.proj_out(output)
    return out


class AttnBlockHost(ReplacingHost):
    """`AttnBlock` and `MemoryEfficientAttnBlock` of `ldm` and `sgm`, and `SpatialSelfAttention`, which is the same."""

    name = "CompVis VAE"
    parts = _PARTS

    def matches(self, original: nn.Module) -> bool:
        """Whether the class has a known name, and the module has the norm and the projections of an AttnBlock."""
        return type(original).__name__ in _CLASSES and all(
            isinstance(getattr(original, part, None), nn.Module) for part in _PARTS
        )

    def misfit(self, module: nn.Module) -> str | None:
        """That the block holds a function, used by its `forward`, that is not from the module of its class."""
        used = set().union(*map(names_in, forward_methods(type(module)).values()))
        for name in sorted(used & vars(module).keys()):
            function = vars(module)[name]
            if isinstance(function, FunctionType) and function.__module__ != type(module).__module__:
                return f"its {name} is {function.__module__}.{function.__qualname__}, which slicemod does not know"
        return None

    def replacement(self, original: Any, slicing: SliceConfig) -> MemoryAwareAttnBlock:
        """A MemoryAwareAttnBlock with as many channels."""
        return MemoryAwareAttnBlock(original.in_channels, slicing)


HOSTS.append(AttnBlockHost())
