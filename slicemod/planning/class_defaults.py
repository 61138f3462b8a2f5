"""Classes of diffusers by their names, and the configs that they have without being told."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def diffusers_class(name: str) -> Any:
    """The class of diffusers with this name, which is imported when it is asked for."""
    import diffusers

    return getattr(diffusers, name)


def whole_config(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the defaults of its class where it says nothing; as it is if diffusers has no such class."""
    import diffusers

    if not hasattr(diffusers, name):
        return config
    parameters = inspect.signature(diffusers_class(name).__init__).parameters.values()
    known = {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
    return {**known, **config}
