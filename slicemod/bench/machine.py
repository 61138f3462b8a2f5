"""What a benchmark ran on: figures mean nothing without it."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import slicemod
from slicemod.kernels.native.build import native_obstacle
from slicemod.kernels.table_in_use import BUILT_IN, NO_TABLE, table_in_use
from slicemod.memory.free_memory import free_memory

_PACKAGES = (
    "diffusers",
    "einops",
    "triton",
    "stable-diffusion-sdkit",
    "memory-efficient-attention-pytorch",
    "xformers",
)


# What a CPU may multiply half precision with, as `torch.cpu.get_capabilities` names it. With or without them the same
# code is several times faster or slower, and PyTorch's own word for the CPU, "AVX512", tells nothing of it.
_PRODUCTS = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "fp16_arith", "sve_bf16")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, device, memory, threads and versions, for JSON.

    >>> describe_machine(torch.device("cpu"))["threads"] == torch.get_num_threads()
    True
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "half_precision": [name for name, there in torch.cpu.get_capabilities().items() if there and name in _PRODUCTS],
        "native_obstacle": native_obstacle(),
        "kernels_by": _kernels_by(),
        "free_memory": free_memory(device),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "slicemod": slicemod.__version__ + commit_of(Path(slicemod.__file__).parent),
            "torch": torch.__version__,  # with its build, which the installed package's version lacks
        }
        | _installed(),
    }


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name where Linux tells it, else what Python knows.

    In virtual machines the name may be of a whole line of products; family and model tell them apart.
    """
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = told.get("model name")
    if name is None:
        return platform.processor() or platform.machine()
    if any(letter.isdigit() for letter in name) or "model" not in told:
        return name
    return f"{name} of family {told['cpu family']}, model {told['model']}"


def _kernels_by() -> str | None:
    """Which table the CPU's kernels are chosen by; None without the native kernel, where there is none to choose."""
    table, source = table_in_use()
    if table is NO_TABLE:
        return None
    return f"{BUILT_IN} table" if source == BUILT_IN else f"table measured {table.measured}"


def commit_of(package: Path) -> str:
    """The words after the version: `at` a commit, and + if the package was changed since; none where git lacks it."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False)

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", "__init__.py").returncode:
        return ""
    changed = git("diff", "--quiet", "HEAD", "--", ".").returncode
    return f" at {git('rev-parse', '--short=10', 'HEAD').stdout.strip()}{'+' if changed else ''}"


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
