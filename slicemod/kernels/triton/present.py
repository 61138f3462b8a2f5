"""Whether a device can run Triton's kernels, and why not."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

_LEAST_CAPABILITY = 80  # Ampere; before it, Triton multiplies half precision without tensor cores
_MATRIX_CORES = "gfx90a", "gfx94", "gfx95"  # how the names of AMD's CDNA 2 to 4 begin


def interpreted() -> bool:
    """Triton's kernels run on the CPU, one program after the other: `TRITON_INTERPRET=1` is in the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device, or None if they can.

    A CUDA device that this machine does not have is planned for as an NVIDIA GPU from Ampere on, with Triton.
    """
    if device.type == "cpu":
        if not interpreted():
            return "it runs on GPUs, and the call is on cpu (TRITON_INTERPRET=1 runs it there, for tests)"
        return None if _is_installed() else "the package triton is not installed"
    if device.type != "cuda":
        return f"it runs on NVIDIA's and AMD's GPUs, and the call is on {device.type}"
    if not torch.cuda.is_available():
        return None
    if not _is_installed():
        return "the package triton is not installed"
    architecture = architecture_of(device)
    return (None if architecture is None else architecture_obstacle(architecture)) or _compiler_obstacle()


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def architecture_of(device: torch.device) -> str | None:
    """What the device's compilers call it: "sm_90", "gfx942". None for a CPU, where Triton interprets."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture_obstacle(architecture: str) -> str | None:
    """Why it does not run on this architecture."""
    if architecture.startswith("gfx"):
        if architecture.startswith(_MATRIX_CORES):
            return None
        return f"it is for AMD's CDNA from MI200 on, and this GPU is {architecture}"
    if int(architecture.removeprefix("sm_")) >= _LEAST_CAPABILITY:
        return None
    return f"it is for NVIDIA's GPUs from Ampere (sm_80) on, and this one is {architecture}"


@cache
def _compiler_obstacle() -> str | None:
    """Triton compiles what starts a kernel with a C compiler, which it looks for in this order."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["clang", "gcc", "cl"]
    if any(shutil.which(compiler) for compiler in compilers):
        return None
    return f"Triton wants a C compiler, and there is no {' or '.join(compilers)} (install one, or set CC)"
