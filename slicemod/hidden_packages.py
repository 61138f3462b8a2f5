"""Optional packages that others import where they find them, for seconds, hidden from these imports."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import cast


@contextmanager
def hidden(packages: Sequence[str]) -> Iterator[None]:
    """What is imported in this block takes these packages for not installed; afterwards they can be imported again.

    Only for a process that is all a command's own: what others import here goes without the packages for good.
    Packages that are loaded already are not hidden.
    """
    absent = [package for package in packages if package not in sys.modules]
    find = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    sys.modules.update(dict.fromkeys(absent, cast("ModuleType", None)))  # an import of None is a ModuleNotFoundError
    importlib.metadata.distribution = distribution  # type: ignore[assignment]  # torchmetrics looks there alone
    try:
        yield
    finally:
        importlib.metadata.distribution = find
        for package in absent:
            if sys.modules[package] is None:
                del sys.modules[package]
