"""Fine-tuning Stable Diffusion: captioned images, frozen stages, what is trained, sampling, the formats of exports."""

from typing import Any


def __getattr__(name: str) -> Any:
    """``slicemod.training.stable_diffusion.StableDiffusion`` stays a class path; what it needs is loaded then."""
    if name != "StableDiffusion":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slicemod.training.stable_diffusion.lightning_module import StableDiffusion

    return StableDiffusion
