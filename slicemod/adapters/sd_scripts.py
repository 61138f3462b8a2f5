"""sd-scripts' CrossAttention: LDM's, but its input is named `hidden_states` and its `to_out` is a ModuleList."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slicemod.adapters.compvis import CrossAttentionHost, arguments_of, has_parts
from slicemod.adapters.replacement import original_of
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.swap import HOSTS


class SdScriptsCrossAttention(MemoryAwareCrossAttention):
    """A `MemoryAwareCrossAttention` that is called, and switched, as the CrossAttention of sd-scripts is."""

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Compute the attention.

        Args:
            hidden_states: `(B, N, C)`.
            context: `(B, M, context_dim)`; `hidden_states` when left out.
            mask: None. What a mask means in sd-scripts depends on its switches, and it passes none.

        Returns:
            `(B, N, C)`.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
            ValueError: there is a mask.
        """
        if mask is not None:
            raise ValueError(
                f"mask: expected None, as sd-scripts passes it; got sizes {tuple(mask.shape)}. Its attention ignores a "
                "mask or not, by its switches; give the layer its own attention back by restore_attention."
            )
        return super().forward(hidden_states, context)

    def set_use_memory_efficient_attention(self, xformers: bool, mem_eff: bool) -> None:
        """Switch the original, for when it is restored; slicemod's attention stays."""
        original: Any = original_of(self)
        original.set_use_memory_efficient_attention(xformers, mem_eff)

    def set_use_sdpa(self, sdpa: bool) -> None:
        """Switch the original, for when it is restored; slicemod's attention stays."""
        original: Any = original_of(self)
        original.set_use_sdpa(sdpa)


class SdScriptsHost(CrossAttentionHost):
    """`CrossAttention` of sd-scripts' `original_unet` and `sdxl_original_unet`, known by class name and parts."""

    name = "sd-scripts"
    kind = SdScriptsCrossAttention

    def matches(self, original: nn.Module) -> bool:
        """Whether the class has the name, and the module the projections, and takes `hidden_states` and `context`."""
        named = type(original).__name__ == "CrossAttention" and has_parts(original)
        return named and arguments_of(type(original))[:2] == ("hidden_states", "context")

    def misfit(self, module: nn.Module) -> str | None:
        """That a processor computes the layer's attention, besides what does not fit any host."""
        processor = getattr(module, "processor", None)
        if processor is not None:
            return f"its processor {type(processor).__name__} computes its attention"
        return super().misfit(module)


HOSTS.insert(0, SdScriptsHost())  # before CompVis LDM, whose class has the same name and parts
