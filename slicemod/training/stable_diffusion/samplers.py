"""The schedulers of diffusers that images are drawn by: the model's own, or one that is chosen by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers

from slicemod.user_error import UserError


class Sampler(NamedTuple):
    """A class of diffusers, and what its config has besides the model's."""

    kind: str
    settings: dict[str, Any]


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", {}),
    "ddpm": Sampler("DDPMScheduler", {}),
    "dpm++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_karras": Sampler(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
    ),
    "dpm++_sde": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": Sampler("EulerDiscreteScheduler", {}),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", {}),
    "heun": Sampler("HeunDiscreteScheduler", {}),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": Sampler("UniPCMultistepScheduler", {}),
}


def build_sampler(config: Mapping[str, Any], changes: Mapping[str, Any], name: str | None = None) -> Any:
    """The scheduler that draws what a model was trained for.

    Args:
        config: of the scheduler that the model came with.
        changes: entries that the training replaced.
        name: one of ``SAMPLERS``; None is the class that the model came with, or DDIM where that cannot follow the
            changes, as ``own_sampler_obstacle`` tells.

    Raises:
        UserError: there is no such name, or what it names cannot follow the changes.
    """
    if name is None:
        own = "DDIMScheduler" if own_sampler_obstacle(config, changes) else str(config["_class_name"])
        return _built(Sampler(own, {}), config, changes)
    if name not in SAMPLERS:
        raise UserError(f"scheduler: expected one of {', '.join(SAMPLERS)}, got {name!r}. Correct the name.")
    chosen = SAMPLERS[name]
    if unknown := _unknown(chosen.kind, changes):
        able = ", ".join(other for other, sampler in SAMPLERS.items() if not _unknown(sampler.kind, changes))
        raise UserError(
            f"scheduler: {name} knows no {', '.join(unknown)}, which the model was trained with: expected one of"
            f" {able}. Choose another."
        )
    return _built(chosen, config, changes)


def own_sampler_obstacle(config: Mapping[str, Any], changes: Mapping[str, Any]) -> str | None:
    """Why the scheduler that a model came with cannot draw what was trained; None where it can."""
    kind = str(config.get("_class_name"))
    if not hasattr(diffusers, kind):
        return f"diffusers has no {kind}"
    unknown = _unknown(kind, changes)
    return f"{kind} knows no {', '.join(unknown)}" if unknown else None


def _unknown(kind: str, changes: Mapping[str, Any]) -> list[str]:
    return [name for name in changes if name not in inspect.signature(getattr(diffusers, kind).__init__).parameters]


def _built(sampler: Sampler, config: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    kind = getattr(diffusers, sampler.kind)
    # Latents are not confined to [-1, 1] as pixels are; some classes confine them where a config does not say.
    latents = {} if _unknown(sampler.kind, {"clip_sample": False}) else {"clip_sample": False}
    return kind.from_config(dict(config), **{**latents, **sampler.settings, **changes})
