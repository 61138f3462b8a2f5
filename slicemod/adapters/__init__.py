"""The hosts whose attention slicemod can swap, one file for each. A file is loaded when it is needed."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """The module of a host."""
    try:
        return import_module(f"slicemod.adapters.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"slicemod.adapters.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
