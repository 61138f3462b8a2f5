"""The native kernel: when it can run a call, what it takes, and from what size on it is the faster one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from slicemod.call import AttentionShape, CallSpec, scale_of
from slicemod.kernels.kernel import Arguments, Inputs, Kernel, Run, Terms
from slicemod.kernels.native.binding import TILED_MODE, NativeLibrary
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.native.operators import native_attention, prepared_inference
from slicemod.plan import SlicePlan
from slicemod.rounding import ceil_div

_LEAST_NATIVE_KEYS = 16  # one key has a gradient of exactly zero for the query

# Wider heads do not leave a block of keys and values in the cache; PyTorch's large products do better then, but for the
# backward pass in bfloat16 and, where it is slow in that, float16.
_WIDEST_NATIVE_HEAD = 256


@dataclass(frozen=True)
class FasterFrom:
    """The least sizes at which the native kernel is faster than PyTorch's, each measured on two cores of one processor.

    PyTorch has no operator in Python around its kernel, so that small inference is faster there. The backward pass
    packs queries for every block of keys, which costs more than PyTorch's kernel does in float32 where one block of few
    keys is all there is; wider heads take more keys to make up for it.

    Attributes:
        inference: the least product of heads, queries, keys and channels.
        training: the same of float32; PyTorch's backward pass in half precision takes several times as long, of however
            small a call.
        training_keys: the fewest keys of float32, for heads of up to `widest_head` channels.
        widest_head: see above.
        wide_training_keys: the fewest keys of float32 for wider heads.
        wide_float16: whether it is faster in float16 however wide heads are.
    """

    inference: int
    training: int
    training_keys: int
    widest_head: int
    wide_training_keys: int
    wide_float16: bool = False


_WITH_AVX2 = FasterFrom(
    inference=2**20, training=2**22, training_keys=64, widest_head=80, wide_training_keys=256, wide_float16=True
)
_WITH_AVX512 = FasterFrom(inference=2**23, training=2**23, training_keys=256, widest_head=64, wide_training_keys=512)
_WITH_TILES = replace(_WITH_AVX512, inference=2**20)


class NativeKernel(Kernel):
    """Attention in C++ for x86-64 CPUs, compiled at its first use.

    Args:
        library: gives the compiled library, or None where there is none.
    """

    name: ClassVar[str] = "native"
    summary: ClassVar[str] = "C++ for x86-64 CPUs with AVX2, AVX-512 or AMX, compiled at its first use"

    def __init__(self, library: Callable[[], NativeLibrary | None] = native_library) -> None:
        self._library = library

    def obstacle(self, call: CallSpec) -> str | None:
        """Why it cannot run this call."""
        shape = call.shape
        if call.device.type != "cpu":
            return f"it runs on CPUs, and the call is on {call.device.type}"
        library = self._library()
        if library is None:
            return native_obstacle() or "its library is not there"
        if call.dtype not in library.modes:
            return f"it does not compute {call.dtype}"
        if call.transformed:
            return "torch.func differentiates PyTorch's operators alone"
        there_is = {
            "a mask": shape.mask is not None,
            "is_causal": shape.causal,
            "dropout": shape.dropout,
            "fewer heads of keys than of queries": shape.group != 1,
            "a scale that is not positive, or that float32 cannot hold": not call.ordinary_scale,
            "values without channels": not shape.values,
        }
        if found := [what for what, is_there in there_is.items() if is_there]:
            return f"it does not compute {', '.join(found)}"
        if shape.keys == 1 and call.training:
            return "the gradient of the query is exactly zero where there is one key, and it gives noise"
        return None

    def pays_off(self, call: CallSpec) -> bool:
        """Measured on processors with each kind of vectors, and with tiles."""
        library, shape, dtype = self._library(), call.shape, call.dtype
        if library is None or shape.keys < _LEAST_NATIVE_KEYS:
            return False
        best = _WITH_TILES if library.modes[dtype] == TILED_MODE else _WITH_AVX512
        if library.vector_lanes == 8:
            best = _WITH_AVX2
        products = shape.scores_bytes // shape.score_itemsize * shape.head_dim
        width = max(shape.head_dim, shape.values)
        any_width = (call.training and dtype == torch.bfloat16) or (best.wide_float16 and dtype == torch.float16)
        if width > _WIDEST_NATIVE_HEAD and not any_width:
            return False
        if not call.training:
            return products >= best.inference
        keys = best.wide_training_keys if width > best.widest_head else best.training_keys
        return dtype.itemsize == 2 or (products >= best.training and shape.keys >= keys)

    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        """In blocks of the rows that its library takes; the library counts its own bytes."""
        library, shape = self._library(), call.shape
        if library is None:
            return None
        sizes = shape.batch, shape.heads, shape.queries, shape.keys, shape.head_dim, shape.values
        rows, forward, backward = library.sizes(call.dtype, sizes, call.threads)
        peak = forward
        if call.training:
            kept = self.kept_bytes(shape, training=True)
            peak = kept + max(forward, backward + kept // 2)  # the backward pass has a number for each row of its own
        if peak > free_bytes:
            return None
        return SlicePlan(
            axis="query",
            steps=ceil_div(shape.queries, rows),
            slice_size=rows,
            peak_bytes=peak,
            kernel=self.name,
            policy=terms.policy,
            heads=1,
            rows=rows,
        )

    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """One operator, forward and backward."""
        query, key, value, _ = inputs
        output: Tensor
        output, _ = native_attention(query, key, value, scale_of(query, more.scale), more.training)
        return output

    def prepare(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Run:
        """In inference all but the pointers is made ready."""
        if more.training:
            return super().prepare(plan, inputs, more)
        query, key, value, _ = inputs
        attend = prepared_inference(query, key, value, scale_of(query, more.scale))
        return lambda query, key, value, _mask: attend(query, key, value)

    def kept_bytes(self, shape: AttentionShape, *, training: bool) -> int:
        """Two numbers for each row, in float32: a product near its largest, and the logarithm of its sum."""
        return 2 * 4 * shape.batch_heads * shape.queries if training else 0
