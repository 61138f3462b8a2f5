"""slicemod in Forge, which has no list of optimizations: the function that its models call is replaced in each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.integrations.comfy_call import sliced_or_own
from slicemod.integrations.webui.settings import ENABLED, add_setting, add_settings, setting, slicing
from slicemod.sdpa_mode import sliced_sdpa

# What the modules in backend.nn import by name from backend.attention. That one itself stays: Forge reads from there
# how much memory a model will take, and its text encoders import another function.
_MODELS, _FUNCTION, _VAE_FUNCTION = "backend.nn.", "attention_function", "attention_function_single_head_spatial"


def register() -> None:
    """Add slicemod's settings to Forge's, and follow them from its start on."""
    callbacks = import_module("modules.script_callbacks")
    callbacks.on_ui_settings(_add_settings)
    callbacks.on_before_ui(follow_setting)
    callbacks.on_script_unloaded(undo)


def follow_setting() -> None:
    """Let Forge's models use slicemod if the setting is on, else Forge's own attention.

    Raises:
        ValueError: the settings are wrong.
    """
    slicing()
    undo()
    if setting(ENABLED):
        _apply()


def undo() -> None:
    """Give every model of Forge its own attention back."""
    for module in _model_modules():
        for name in (_FUNCTION, _VAE_FUNCTION):
            own = getattr(vars(module).get(name), "slicemod_replaces", None)
            if own is not None:
                setattr(module, name, own)


def _apply() -> None:
    for name in ("unet", "flux", "chroma", "vae"):
        _import_if_there(f"{_MODELS}{name}")
    own = import_module("backend.attention")
    for module in _model_modules():
        for name, replacement in ((_FUNCTION, _sliced), (_VAE_FUNCTION, _sliced_for_vae)):
            function = vars(module).get(name)
            if function is not None and function is getattr(own, name):
                setattr(module, name, replacement(function))


def _import_if_there(name: str) -> None:
    """Import a model's module before its attention is replaced; Forge's kin have others."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise


def _model_modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith(_MODELS)]


def _sliced(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(own)
    def attention_function(*args: Any, **kwargs: Any) -> Tensor:
        return sliced_or_own(_slicer(slicing()), own, args, kwargs)

    attention_function.slicemod_replaces = own  # type: ignore[attr-defined]
    return attention_function


def _sliced_for_vae(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(own)
    def attention_function_single_head_spatial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of all pixels, `(B, C, height, width)`, or of all pixels of all frames, to each other."""
        query, key, value = (each.flatten(2).transpose(1, 2).unsqueeze(1) for each in (q, k, v))  # (B, 1, N, C)
        output = sliced_attention(query, key, value, slicing=slicing())
        return output.squeeze(1).transpose(1, 2).reshape(v.shape)

    attention_function_single_head_spatial.slicemod_replaces = own  # type: ignore[attr-defined]
    return attention_function_single_head_spatial


@lru_cache(maxsize=8)
def _slicer(config: SliceConfig) -> sliced_sdpa:
    return sliced_sdpa(config)


def _add_settings() -> None:
    add_setting(
        ENABLED,
        "slicemod: compute the attention of UNet, Flux, Chroma and VAE within a memory budget",
        "the images are the same",
        import_module("gradio").Checkbox,
        onchange=follow_setting,
    )
    add_settings()
