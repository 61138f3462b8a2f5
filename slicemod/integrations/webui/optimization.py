"""The optimization "slicemod" of AUTOMATIC1111's webui."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from slicemod.integrations.webui.settings import add_settings, slicing
from slicemod.integrations.webui.sliced_forwards import attn_block_forward, cross_attention_forward


def register() -> None:
    """Offer "slicemod" among the optimizations of cross attention, and its settings beside them."""
    callbacks = import_module("modules.script_callbacks")
    callbacks.on_list_optimizers(lambda optimizations: optimizations.append(sliced_optimization()))
    callbacks.on_ui_settings(add_settings)


def sliced_optimization() -> Any:
    """The webui's `SdOptimization` that puts slicemod's `forward` on the attention of LDM and sgm.

    Its `undo` is the webui's. "Automatic" never takes it, because its priority is below that of all others.
    """
    optimizations = import_module("modules.sd_hijack_optimizations")

    class SlicedOptimization(optimizations.SdOptimization):  # type: ignore[name-defined, misc]
        name = "slicemod"
        priority = -1

        def apply(self) -> None:
            slicing()  # raises now if the settings are wrong, which the webui shows
            for library in ("ldm", "sgm"):
                import_module(f"{library}.modules.attention").CrossAttention.forward = cross_attention_forward
                import_module(f"{library}.modules.diffusionmodules.model").AttnBlock.forward = attn_block_forward

    return SlicedOptimization()
