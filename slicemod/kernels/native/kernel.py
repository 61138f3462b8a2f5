"""The native kernel: what it can run, how many bytes it takes, and from which size on it is faster than PyTorch's."""

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

_LEAST_NATIVE_KEYS = 16  # calls with fewer keys are left to the other kernels

# A block of keys and values of wider heads does not fit the cache. PyTorch's large products are then faster, except for
# the backward pass in bfloat16, and for float16 on processors where PyTorch is slow in it.
_WIDEST_NATIVE_HEAD = 256


@dataclass(frozen=True)
class FasterFrom:
    """The smallest sizes at which the native kernel is faster than PyTorch's on one kind of processor.

    Small calls in inference are faster by PyTorch's kernel, because no Python runs around it. The backward pass of the
    native kernel packs the queries again for every block of keys. If there are only few keys, and so one block, this
    costs more in float32 than it saves. The wider the heads, the more keys it takes to pay off.

    Attributes:
        inference: the smallest product of batch, heads, queries, keys and channels in inference.
        training: the same for training in float32. There is no limit in half precision, where PyTorch's backward pass
            takes several times as long for small calls too.
        training_keys: the fewest keys for training in float32, with heads of up to `widest_head` channels.
        widest_head: the most channels for which `training_keys` holds.
        wide_training_keys: the fewest keys for training in float32 with wider heads.
        wide_float16: it is faster in float16 for heads of any width.
    """

    inference: int
    training: int
    training_keys: int
    widest_head: int
    wide_training_keys: int
    wide_float16: bool = False


# Measured in November 2026 with torch 2.14 on two cores: with AVX2 on an AMD EPYC (Zen 3); with AVX-512 and with the
# tiles of AMX on an Intel Xeon with AMX.
_WITH_AVX2 = FasterFrom(
    inference=2**20, training=2**22, training_keys=64, widest_head=80, wide_training_keys=256, wide_float16=True
)
_WITH_AVX512 = FasterFrom(inference=2**23, training=2**23, training_keys=256, widest_head=64, wide_training_keys=512)
_WITH_TILES = replace(_WITH_AVX512, inference=2**20)


class NativeKernel(Kernel):
    """Attention in C++ for x86-64 CPUs, compiled at its first use.

    Args:
        library: returns the compiled library, or None if there is none.
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
            "heads without channels": not (shape.head_dim and shape.values),
        }
        if found := [what for what, is_there in there_is.items() if is_there]:
            return f"it does not compute {', '.join(found)}"
        if shape.keys == 1 and call.training:
            return "the gradient of the query is exactly zero where there is one key, and it gives noise"
        return None

    def pays_off(self, call: CallSpec) -> bool:
        """By `FasterFrom`, for the vectors that the processor has, and for the tiles of AMX."""
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
        """Blocks of as many rows as the library computes at a time. The library itself counts its bytes."""
        library, shape = self._library(), call.shape
        if library is None:
            return None
        sizes = shape.batch, shape.heads, shape.queries, shape.keys, shape.head_dim, shape.values
        rows, forward, backward = library.sizes(call.dtype, sizes, call.threads)
        peak = forward
        if call.training:
            kept = self.kept_bytes(shape, training=True)
            peak = kept + max(forward, backward + kept // 2)  # the backward pass computes one more number for each row
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
        """In inference everything but the addresses of the tensors is prepared."""
        if more.training:
            return super().prepare(plan, inputs, more)
        query, key, value, _ = inputs
        attend = prepared_inference(query, key, value, scale_of(query, more.scale))
        return lambda query, key, value, _mask: attend(query, key, value)

    def kept_bytes(self, shape: AttentionShape, *, training: bool) -> int:
        """Two float32 numbers for each row: a product near its largest, and the logarithm of its sum of weights."""
        return 2 * 4 * shape.batch_heads * shape.queries if training else 0
