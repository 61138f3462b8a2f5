"""Whether a program's PyTorch is new enough, asked before anything of slicemod needs it.

Programs come with a PyTorch of their own, and slicemod is installed beside it without pip's look at versions.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version


def ensure_torch_is_new_enough(installed: str | None = None, requirements: list[str] | None = None) -> None:
    """Say so in words if it is not.

    Args:
        installed: the version of PyTorch; that of this Python when left out.
        requirements: what slicemod requires; what its own metadata say when left out, if it has any.

    Raises:
        ImportError: the PyTorch is older than slicemod requires, or there is none.
    """
    try:
        requirements = requires("slicemod") or [] if requirements is None else requirements
    except PackageNotFoundError:  # it runs from its sources
        return
    needed = next((found[1] for text in requirements if (found := re.match(r"torch\s*>=\s*([\d.]+)", text))), "0")
    try:
        installed = version("torch") if installed is None else installed
    except PackageNotFoundError:
        installed = "none"
    if _numbers(installed) < _numbers(needed):
        raise ImportError(f"PyTorch: expected version {needed} or newer; got {installed}. Update PyTorch there")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:2]))
