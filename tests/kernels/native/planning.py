"""The native kernel's plan of a call that `auto` would give it."""

from __future__ import annotations

import torch

from slicemod import SlicePlan
from slicemod.call import AttentionShape, CallSpec
from slicemod.kernels.kernel import Terms
from slicemod.kernels.native.binding import NativeLibrary
from slicemod.kernels.native.build import native_library
from slicemod.kernels.native.kernel import NativeKernel
from slicemod.kernels.table_in_use import built_in_table


def plan_of(
    shape: AttentionShape,
    dtype: torch.dtype,
    free_bytes: int,
    *,
    training: bool,
    threads: int,
    library: NativeLibrary | None = None,
) -> SlicePlan | None:
    """None where it cannot run the call, does not pay off or does not fit."""
    library = native_library() if library is None else library
    assert library is not None
    kernel, table = NativeKernel(lambda: library), built_in_table(library)
    call = CallSpec(shape, dtype, torch.device("cpu"), training, threads=threads)
    if kernel.obstacle(call) is not None or not kernel.pays_off(call, table):
        return None
    return kernel.plan(call, free_bytes, Terms())
