"""The native kernel's plan of a call that `auto` would give it."""

from __future__ import annotations

import torch

from slicemod import SlicePlan
from slicemod.call import AttentionShape, CallSpec
from slicemod.kernels.kernel import Terms
from slicemod.kernels.native.kernel import NativeKernel


def plan_of(
    shape: AttentionShape,
    dtype: torch.dtype,
    free_bytes: int,
    *,
    training: bool,
    threads: int,
    kernel: NativeKernel | None = None,
) -> SlicePlan | None:
    """None where it cannot run the call, does not pay off or does not fit."""
    kernel = NativeKernel() if kernel is None else kernel
    call = CallSpec(shape, dtype, torch.device("cpu"), training, threads=threads)
    if kernel.obstacle(call) is not None or not kernel.pays_off(call):
        return None
    return kernel.plan(call, free_bytes, Terms())
