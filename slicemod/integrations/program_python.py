"""Which Python a program runs in, and whether slicemod can be imported there."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import slicemod

# Below the program's folder: virtual environments, and the Pythons that come along in packages for Windows.
_PLACES = (
    "venv/bin/python",
    ".venv/bin/python",
    "venv/Scripts/python.exe",
    ".venv/Scripts/python.exe",
    "../python_embeded/python.exe",  # so spelled
    "../system/python/python.exe",
)
_ASKED = "import importlib.util as i; print([bool(i.find_spec(name)) for name in ('slicemod', 'torch')])"


@dataclass(frozen=True)
class ProgramPython:
    """A Python that a program comes with.

    Attributes:
        path: the interpreter.
        has_slicemod: whether slicemod and PyTorch are installed there; None if it could not be started.
    """

    path: Path
    has_slicemod: bool | None


def python_of(root: Path) -> ProgramPython | None:
    """The Python that belongs to the program in this folder; None if it has none of its own."""
    for place in _PLACES:
        path = root / place
        if path.exists():
            return ProgramPython(path, _has_slicemod(path))
    return None


def _has_slicemod(python: Path) -> bool | None:
    try:
        asked = subprocess.run(  # without this process's paths, which that Python does not have
            [str(python), "-E", "-c", _ASKED], cwd=python.parent, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip() == "[True, True]"


def install_command(python: Path | str) -> str:
    """The command that installs slicemod into a Python which has PyTorch, and leaves that PyTorch alone."""
    return f'"{python}" -m pip install --no-deps "{source()}" einops'


def source() -> str:
    """What pip installs this slicemod from: the clone that it runs from, or its name."""
    clone = Path(slicemod.__file__).resolve().parents[1]
    if (clone / "pyproject.toml").exists():
        return str(clone)
    try:
        described = distribution("slicemod").read_text("direct_url.json")
    except PackageNotFoundError:
        described = None
    return "slicemod" if described is None else str(json.loads(described)["url"])
