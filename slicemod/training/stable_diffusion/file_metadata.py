"""What a safetensors file says about itself: Stability's model specification, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from slicemod import __version__

_STABILITY = "https://github.com/Stability-AI/generative-models"


class _Kind(NamedTuple):
    """What Stability's specification and kohya call a kind of model."""

    architecture: str
    kohya: str


def model_metadata(settings: Mapping[str, Any], step: int, title: str, resolution: int) -> dict[str, str]:
    """Of a file that holds a whole model under CompVis' names.

    Args:
        settings: what a checkpoint stores.
        step: after which the weights were written.
        title: name of the model.
        resolution: edge in pixels of the images that it was made for.
    """
    own = {"modelspec.architecture": _kind(settings).architecture, "modelspec.implementation": _STABILITY}
    return {**own, "modelspec.resolution": f"{resolution}x{resolution}", **_common(settings, step, title)}


def lora_metadata(settings: Mapping[str, Any], step: int, title: str) -> dict[str, str]:
    """Of a file that holds low-rank adapters under diffusers' names; arguments as of ``model_metadata``.

    Webuis offer an adapter only beside models of its kind, which they take from kohya's ``ss_base_model_version``.
    """
    kind = _kind(settings)
    return {
        "modelspec.architecture": f"{kind.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "ss_base_model_version": kind.kohya,
        "ss_v2": str(kind.kohya.startswith("sd_v2")),
        **_common(settings, step, title),
    }


def _kind(settings: Mapping[str, Any]) -> _Kind:
    unet = settings["unet"]
    velocity = settings["prediction_type"] == "v_prediction"
    if unet.get("addition_embed_type") == "text_time":
        return _Kind("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
    if unet.get("use_linear_projection"):
        return _Kind("stable-diffusion-v2-768-v", "sd_v2_v") if velocity else _Kind("stable-diffusion-v2-512", "sd_v2")
    return _Kind("stable-diffusion-v1", "sd_v1_v" if velocity else "sd_v1")


def _common(settings: Mapping[str, Any], step: int, title: str) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if settings["prediction_type"] == "v_prediction" else "epsilon",
        "slicemod.version": __version__,
        "slicemod.source": settings["source"],
        "slicemod.trained": settings["trained"],
        "slicemod.step": str(step),
    }
