"""Written by `slicemod install comfyui`, and taken out by `slicemod uninstall comfyui`.

The nodes are in slicemod, so that this file need not change when slicemod is upgraded.
"""

import sys
from typing import Any, ClassVar

SOURCE = "slicemod"


class NotInstalled:
    """In the place of each node where slicemod cannot be imported: it says why when a workflow runs."""

    reason: ClassVar[str] = ""
    CATEGORY = "slicemod"
    FUNCTION = "run"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """As optional inputs all that the nodes have, so that a workflow keeps its settings."""
        named = dict.fromkeys(("budget", "policy", "kernel"), ("STRING", {"default": "auto"}))
        return {"required": {"model": ("MODEL",)}, "optional": {**named, "samples": ("LATENT",)}}

    def run(self, **_inputs: Any) -> Any:
        """Say why."""
        raise RuntimeError(self.reason)


class NoPlans(NotInstalled):
    """The same, with the outputs of the other node."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("LATENT", "STRING")


try:
    from slicemod.integrations.needed_torch import ensure_torch_is_new_enough

    ensure_torch_is_new_enough()
    from slicemod.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ImportError as error:
    NotInstalled.reason = (
        f"slicemod cannot be imported by the Python that ComfyUI runs in, {sys.executable}: {error}. What installs it "
        f'there, before ComfyUI is started again: "{sys.executable}" -m pip install --no-deps "{SOURCE}" einops'
    )
    print(f"[slicemod] {NotInstalled.reason}", file=sys.stderr)
    NODE_CLASS_MAPPINGS = {"SlicemodAttention": NotInstalled, "SlicemodPlans": NoPlans}
    NODE_DISPLAY_NAME_MAPPINGS = {
        "SlicemodAttention": "Sliced attention (slicemod is missing)",
        "SlicemodPlans": "Attention plans (slicemod is missing)",
    }
