"""slicemod's settings in the webui, in Settings, Optimizations."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from slicemod.config import SliceConfig
from slicemod.kernels.sliced.planner import POLICIES

SECTION = ("optimizations", "Optimizations")
BUDGET, POLICY, ENABLED = "slicemod_budget", "slicemod_policy", "slicemod_enabled"
_DEFAULTS = {BUDGET: "auto", POLICY: "exact", ENABLED: False}


def setting(name: str) -> Any:
    """The value of a setting, also where the webui runs without its settings page, as for its API alone."""
    return getattr(import_module("modules.shared").opts, name, _DEFAULTS[name])


def slicing() -> SliceConfig:
    """What the user has set.

    Raises:
        ValueError: the budget or the policy is none. The webui then shows the error, and takes back the change.
    """
    return SliceConfig.of({"budget": setting(BUDGET), "policy": setting(POLICY)})


def add_settings() -> None:
    """Add budget and policy to the webui's settings."""
    gradio = import_module("gradio")
    add_setting(
        BUDGET,
        "slicemod: what attention may allocate beyond its inputs and output",
        "auto for all that is free, a size such as 512MiB or 2GiB, or a share of what is free such as 0.25",
        gradio.Textbox,
        onchange=slicing,
    )
    add_setting(
        POLICY,
        "slicemod: who chooses the slices",
        "exact, or a rule of other optimizations",
        gradio.Dropdown,
        {"choices": list(POLICIES)},
        onchange=slicing,
    )


def add_setting(name: str, label: str, info: str, component: Any, arguments: Any = None, *, onchange: Any) -> None:
    """Add one of slicemod's settings to the webui's, with what to call when it was changed."""
    shared = import_module("modules.shared")
    option = shared.OptionInfo(_DEFAULTS[name], label, component, arguments, onchange, SECTION)
    shared.opts.add_option(name, option.info(info))
