"""Plans of the two kernels for half precision on a CPU: bfloat16 products, and flash attention in float32.

PyTorch's own fused kernel is slower than the one where the processor multiplies bfloat16, and than the other where it
does not.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from slicemod.bf16_shape import bf16_tiles
from slicemod.plan import SlicePlan
from slicemod.shapes import AttentionShape, ceil_div

# With fewer keys than this the fused kernel is faster than bfloat16 products.
LEAST_BF16_KEYS = 512

# Query, key, value and output of a turn in float32; more heads at a time are no faster.
_TURN_BYTES = 2 * 2**20


def bf16_plan(shape: AttentionShape, free_bytes: int, *, policy: str, training: bool, threads: int) -> SlicePlan | None:
    """The plan of `bf16_attention`, or None where it does not fit or is not the faster one."""
    if shape.keys < LEAST_BF16_KEYS or shape.mask is not None or shape.causal or shape.dropout:
        return None
    tiles = bf16_tiles(shape, free_bytes, threads, training=training)
    if tiles is None:
        return None
    by_rows = tiles.rows < shape.queries
    return SlicePlan(
        axis="query" if by_rows else "heads",
        steps=ceil_div(shape.queries, tiles.rows) if by_rows else ceil_div(shape.batch_heads, tiles.heads),
        slice_size=tiles.rows if by_rows else tiles.heads,
        peak_bytes=tiles.peak(threads, training=training),
        kernel="bf16",
        policy=policy,
        heads=tiles.heads,
        rows=tiles.rows,
    )


HalfKernel = Literal["bf16", "float32"]


def half_kernel(dtype: torch.dtype, device: torch.device) -> HalfKernel | None:
    """The kernel that suits `dtype` on this processor, or None where it is PyTorch's own.

    Products in bfloat16 where there are instructions for them; where there are none for a half precision, PyTorch's
    flash attention in float32.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if dtype == torch.bfloat16:
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return None if torch.ops.mkldnn._is_mkldnn_fp16_supported() else "float32"


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
    shape: AttentionShape, free_bytes: int, *, policy: str, training: bool, threads: int
) -> SlicePlan | None:
    """The plan of `float32_flash`, or None where it does not fit.

    The backward pass spreads heads over the threads, and nothing else, so that a turn has a multiple of `threads`.
    """
    if shape.group != 1 or shape.head_dim != shape.values:
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
