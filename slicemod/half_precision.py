"""Whether and how this machine's CPU multiplies half precision."""

from __future__ import annotations

import os
from typing import Literal

import torch

from slicemod.torch_internals import has_bfloat16_vectors, has_tiles, multiplies_bfloat16, multiplies_float16

# How oneDNN multiplies half precision: "bfloat16" by AVX512-BF16, "tiles" by AMX, "widened" for bfloat16 in float32 on
# AVX-512 with neither of these, "float16" by AVX512-FP16.
Products = Literal["bfloat16", "tiles", "widened", "float16"]


def cpu_products(dtype: torch.dtype) -> Products | None:
    """How oneDNN multiplies `dtype` on this CPU; None if it does not, or if `dtype` is not a half precision."""
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        limit = onednn_limit()
        if has_tiles() and (not limit or "AMX" in limit):
            return "tiles"
        has_instructions = has_bfloat16_vectors() and limit not in ("AVX512_CORE", "AVX512_CORE_VNNI")
        return "bfloat16" if has_instructions else "widened"
    if dtype == torch.float16 and multiplies_float16():
        return "float16"
    return None


def onednn_limit() -> str:
    """The instruction set that the user limits oneDNN to, as the environment variable names it; empty without one."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return "" if limit.upper() in ("ALL", "DEFAULT") else limit.upper()
