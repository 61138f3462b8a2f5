"""Kernels for the CPU beside PyTorch's fused one: which of them this processor has, and their plans.

The native kernel (`kernels/native/`) is mostly the fastest where it can be built. Where a processor multiplies no
half precision, PyTorch's flash attention takes some heads at a time in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from slicemod.kernels.native.binding import TILED_MODE, NativeLibrary
from slicemod.kernels.native.build import native_library
from slicemod.onednn_scratch import Products, bfloat16_products
from slicemod.plan import SlicePlan
from slicemod.shapes import AttentionShape, ceil_div

_LEAST_NATIVE_KEYS = 16  # one key has a gradient of exactly zero for the query

# Wider heads do not leave a block of keys and values in the cache; PyTorch's large products do better then, but for the
# backward pass in bfloat16 and, where it is slow in that, float16.
_WIDEST_NATIVE_HEAD = 256


@dataclass(frozen=True)
class PaysOffFrom:
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


_WITH_AVX2 = PaysOffFrom(
    inference=2**20, training=2**22, training_keys=64, widest_head=80, wide_training_keys=256, wide_float16=True
)
_WITH_AVX512 = PaysOffFrom(inference=2**23, training=2**23, training_keys=256, widest_head=64, wide_training_keys=512)
_WITH_TILES = replace(_WITH_AVX512, inference=2**20)

# Query, key, value and output of a turn in float32; more heads at a time are no faster.
_TURN_BYTES = 2 * 2**20


@dataclass(frozen=True)
class CpuKernels:
    """What a processor has for tensors of a dtype beside PyTorch's fused kernel as it is.

    Attributes:
        native: the dtype, where the native kernel computes it.
        converts: the dtype, where there are no instructions for this half precision.
        products: how oneDNN multiplies this half precision within PyTorch's fused kernel, if it does.
    """

    native: torch.dtype | None = None
    converts: torch.dtype | None = None
    products: Products | None = None


NO_CPU_KERNELS = CpuKernels()


def cpu_kernels(dtype: torch.dtype, device: torch.device) -> CpuKernels:
    """The kernels of this processor for `dtype`; none for another device."""
    if device.type != "cpu":
        return NO_CPU_KERNELS
    library = native_library()
    native = dtype if library is not None and dtype in library.modes else None
    products: Products | None = None
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        products = bfloat16_products()
    elif dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        products = "float16"
    converts = dtype if dtype.itemsize == 2 and products is None else None
    return CpuKernels(native, converts=converts, products=products)


def _is_faster(library: NativeLibrary, shape: AttentionShape, dtype: torch.dtype, *, training: bool) -> bool:
    """Whether the native kernel is measured to be faster than PyTorch's."""
    best = _WITH_TILES if library.modes[dtype] == TILED_MODE else _WITH_AVX512
    if library.vector_lanes == 8:
        best = _WITH_AVX2
    products = shape.scores_bytes // shape.score_itemsize * shape.head_dim
    width = max(shape.head_dim, shape.values)
    any_width = (training and dtype == torch.bfloat16) or (best.wide_float16 and dtype == torch.float16)
    if width > _WIDEST_NATIVE_HEAD and not any_width:
        return False
    if not training:
        return products >= best.inference
    keys = best.wide_training_keys if width > best.widest_head else best.training_keys
    return dtype.itemsize == 2 or (products >= best.training and shape.keys >= keys)


def native_plan(
    shape: AttentionShape, dtype: torch.dtype, free_bytes: int, *, policy: str, training: bool, threads: int
) -> SlicePlan | None:
    """The plan of the native kernel; None where it does not fit, cannot compute the call or is not the faster one."""
    library = native_library()
    plain = shape.mask is None and not shape.causal and not shape.dropout and shape.group == 1
    if library is None or not plain or not shape.values or shape.keys < _LEAST_NATIVE_KEYS:
        return None
    if not _is_faster(library, shape, dtype, training=training):
        return None
    sizes = shape.batch, shape.heads, shape.queries, shape.keys, shape.head_dim, shape.values
    rows, forward, backward = library.sizes(dtype, sizes, threads)
    peak = forward
    if training:
        of_rows = 4 * shape.batch_heads * shape.queries  # two are kept, and the backward pass has one of its own
        peak = 2 * of_rows + max(forward, backward + of_rows)
    if peak > free_bytes:
        return None
    return SlicePlan(
        axis="query",
        steps=ceil_div(shape.queries, rows),
        slice_size=rows,
        peak_bytes=peak,
        kernel="native",
        policy=policy,
        heads=1,
        rows=rows,
    )


@dataclass(frozen=True)
class Float32Flash:
    """Bytes of `float32_flash` in turns of `heads` heads, on `threads` threads."""

    shape: AttentionShape
    heads: int
    threads: int

    def peak(self, *, training: bool) -> int:
        """Peak bytes beyond inputs, output and input gradients."""
        shape = self.shape
        turn = replace(shape, batch=1, heads=self.heads, key_heads=None, itemsize=4, upcast=False, mask=None)
        rows, keys = self.heads * shape.queries * shape.head_dim, self.heads * shape.keys * shape.head_dim
        mask = 0
        if shape.mask is not None:
            part = replace(shape.mask, batch=1, heads=min(shape.mask.heads, self.heads))
            mask = 4 * part.elements
        forward = 4 * (2 * rows + 2 * keys) + turn.flash_peak(self.threads, training=False) + mask
        if not training:
            return forward
        kept = 4 * shape.batch_heads * shape.queries
        backward = 4 * (4 * rows + 4 * keys) + turn.flash_peak(self.threads, training=True) + mask
        return kept + max(forward, backward)


def float32_flash_plan(
    shape: AttentionShape, dtype: torch.dtype, free_bytes: int, *, policy: str, training: bool, threads: int
) -> SlicePlan | None:
    """The plan of `float32_flash`; None where it does not fit or PyTorch's kernel is as fast.

    That one converts bfloat16 as it goes in the forward pass, in less memory: converted beforehand it took 0.85 to 1.7
    times as long, measured with AVX2. The backward pass takes it five times as long, and all of float16 twice and more.

    The backward pass spreads heads over the threads, and nothing else, so that a turn has a multiple of `threads`.
    """
    if shape.group != 1 or shape.head_dim != shape.values:
        return None
    if dtype == torch.bfloat16 and not training:
        return None
    per_head = 8 * (shape.queries + shape.keys) * max(1, shape.head_dim)
    heads = min(shape.heads, max(1, _TURN_BYTES // per_head // threads) * threads)
    while (flash := Float32Flash(shape, heads, threads)).peak(training=training) > free_bytes:
        if heads == 1:
            return None
        heads //= 2
    return SlicePlan(
        axis="heads",
        steps=ceil_div(shape.batch_heads, heads),
        slice_size=heads,
        peak_bytes=flash.peak(training=training),
        kernel="fused",
        policy=policy,
        heads=heads,
        rows=shape.queries,
        upcast=True,
    )
