"""The native kernel's plan of a call, whether it pays off or not."""

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
) -> SlicePlan | None:
    """None where it cannot run the call, or does not fit."""
    kernel = NativeKernel()
    call = CallSpec(shape, dtype, torch.device("cpu"), training, threads=threads)
    if kernel.obstacle(call) is not None:
        return None
    return kernel.plan(call, free_bytes, Terms())
