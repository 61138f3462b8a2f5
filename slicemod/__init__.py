"""slicemod: exact attention in slices that fit a memory budget, for latent-diffusion UNets.

The names of `public.py` are loaded when the first of them is asked for, so that `slicemod --help` need not wait for
PyTorch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicemod.planning.picture import plan_picture as plan_picture
    from slicemod.public import *  # noqa: F403
    from slicemod.public import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A module of this package, or a public name."""
    if name == "plan_picture":  # public too, but left out of `import *`, because it needs diffusers
        return import_module("slicemod.planning.picture").plan_picture
    if not name.startswith("_") and find_spec(f"slicemod.{name}") is not None:
        return import_module(f"slicemod.{name}")
    if name == "__all__" or not name.startswith("_"):
        public = import_module("slicemod.public")
        globals().update({known: getattr(public, known) for known in ("__all__", *public.__all__)})
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__"), "plan_picture"})
