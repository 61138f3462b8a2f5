"""The nodes that ComfyUI shows: "Sliced attention" and "Attention plans"."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

from slicemod.config import SliceConfig
from slicemod.integrations.comfyui.override import KEY, SlicedOverride
from slicemod.kernels import KERNELS
from slicemod.kernels.sliced.planner import POLICIES

_OURS = "slicemod"  # the key of our override in a model's options, wherever other nodes put theirs
_LOG = logging.getLogger("slicemod")


class SlicedAttention:
    """A model whose attention slicemod computes within a memory budget."""

    CATEGORY = "slicemod"
    DESCRIPTION = "The attention of the model stays within a memory budget. The images are the same."
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("MODEL",),
                "budget": ("STRING", {
                    "default": "auto",
                    "tooltip": "What the attention may allocate beyond its inputs and output: auto for all that is "
                    "free, a size such as 512MiB or 2GiB, or a share of what is free such as 0.25.",
                }),
                "policy": (list(POLICIES), {
                    "default": "exact",
                    "tooltip": "Who chooses the slices where the kernel is math: exact, or a rule of web UIs.",
                }),
                "kernel": (["auto", *(kernel.name for kernel in KERNELS)], {
                    "default": "auto",
                    "tooltip": "auto takes the best kernel that fits the budget. Any other runs or raises an error.",
                }),
            }
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, budget: str) -> bool | str:  # noqa: N802 - ComfyUI's name
        """Whether the budget is one, or why not."""
        try:
            SliceConfig(budget=budget)
        except ValueError as error:
            return str(error)
        return True

    def patch(self, model: Any, budget: str, policy: str, kernel: str) -> tuple[Any]:
        """A clone of the model with slicemod's attention.

        Raises:
            RuntimeError: this ComfyUI does not let a node choose the attention.
            ValueError: settings that do not go together.
        """
        _ensure_overrides_work()
        sliced = model.clone()
        options = sliced.model_options.setdefault("transformer_options", {})
        override = SlicedOverride({"budget": budget, "policy": policy, "kernel": kernel}, options.get(KEY))
        options[KEY] = sliced.model_options[_OURS] = override
        _start_runs_by(override, sliced)
        return (sliced,)


class AttentionPlans:
    """What became of the attention calls of the last run of a model."""

    CATEGORY = "slicemod"
    DESCRIPTION = (
        "The calls of attention in the last run, with their sizes, kernels and plans. They are printed as well."
    )
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("LATENT", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("samples", "plans")
    FUNCTION = "tell"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The inputs, as ComfyUI asks for them."""
        tooltips = ("The model that the sampler was given.", "The sampler's output, so that this node runs after it.")
        model, samples = ({"tooltip": text} for text in tooltips)
        return {"required": {"model": ("MODEL", model), "samples": ("LATENT", samples)}}

    def tell(self, model: Any, samples: Any) -> dict[str, Any]:
        """The samples as they came, and the plans as text.

        Raises:
            ValueError: the model comes from no "Sliced attention" node.
        """
        text = plans_text(model)
        _LOG.info("%s", text)
        return {"ui": {"text": [text]}, "result": (samples, text)}


def plans_text(model: Any) -> str:
    """The report of a model's last run, and what stands between slicemod and its attention.

    Raises:
        ValueError: the model comes from no "Sliced attention" node.
    """
    override = model.model_options.get(_OURS)
    if override is None:
        raise ValueError(
            'model: expected one that comes from the node "Sliced attention"; got one without slicemod\'s attention. '
            "Connect the model that the sampler is given."
        )
    lines = [f"Sliced attention ({override.slicing}): {override.report}"]
    around = model.model_options.get("transformer_options", {}).get(KEY)
    for other, place in ((override.former, "before"), (None if around is override else around, "after")):
        if other is not None:
            lines.append(f'  {_name(other)}, of a node {place} "Sliced attention", decides which calls get here')
    if around is None:
        lines.append('  a node after "Sliced attention" took it off')
    return "\n".join(lines)


def _name(function: Callable[..., Any]) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _start_runs_by(override: SlicedOverride, model: Any) -> None:
    """Let each run of the sampler start a new list of calls, and say so if it brought none."""
    run = import_module("comfy.patcher_extension").WrappersMP.OUTER_SAMPLE

    def outer_sample(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        override.start_run()
        output = executor(*args, **kwargs)
        report = override.report
        if not (report.calls or report.in_graphs or report.passed_on):
            _LOG.warning(
                "Sliced attention: no call of attention got to slicemod in this run. Another node's attention took "
                'them, as the node "Attention plans" tells, or the model is of a kind that lets no node choose it.'
            )
        return output

    model.remove_wrappers_with_key(run, _OURS)
    model.add_wrapper_with_key(run, _OURS, outer_sample)


def _ensure_overrides_work() -> None:
    attention = import_module("comfy.ldm.modules.attention")
    if not hasattr(attention, "wrap_attn"):
        raise RuntimeError(
            "ComfyUI: expected a version of September 2025 or newer, in which a node can choose the attention of a "
            "model; got one whose comfy.ldm.modules.attention has no wrap_attn. Update ComfyUI."
        )


NODE_CLASS_MAPPINGS = {"SlicemodAttention": SlicedAttention, "SlicemodPlans": AttentionPlans}
NODE_DISPLAY_NAME_MAPPINGS = {"SlicemodAttention": "Sliced attention", "SlicemodPlans": "Attention plans"}
