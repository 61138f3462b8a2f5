"""The hosts that slicemod swaps attention in, a file each; loaded when one is asked for."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """The file of a host."""
    try:
        return import_module(f"slicemod.adapters.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"slicemod.adapters.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
