"""Whether and how this machine's CPU multiplies half precision."""

from __future__ import annotations

import os
from typing import Literal

import torch

from slicemod.torch_internals import has_bfloat16_vectors, has_tiles, multiplies_bfloat16, multiplies_float16

# bfloat16 by AVX512-BF16, by AMX, or in float32 by AVX-512 that has neither; float16 by AVX512-FP16.
Products = Literal["bfloat16", "tiles", "widened", "float16"]


def cpu_products(dtype: torch.dtype) -> Products | None:
    """How oneDNN multiplies `dtype` on this CPU; None where it has no instructions for it, or needs none."""
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
    """The instructions that the user has oneDNN stop at, as its variable spells them; empty where there is no limit."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return "" if limit.upper() in ("ALL", "DEFAULT") else limit.upper()
