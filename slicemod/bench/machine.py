"""What a benchmark ran on: figures mean nothing without it."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import slicemod
from slicemod.kernels.native.build import native_obstacle
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
        "free_memory": free_memory(device),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "slicemod": slicemod.__version__,
            "torch": torch.__version__,  # with its build, which the installed package's version lacks
        }
        | _installed(),
    }


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name where Linux tells it, else what Python knows."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
