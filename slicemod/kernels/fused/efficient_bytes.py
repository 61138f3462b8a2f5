"""The bytes that PyTorch's memory-efficient CUDA kernel allocates.

Its forward pass is in ATen/native/transformers/cuda/attention.cu (`_efficient_attention_forward`), its backward pass in
attention_backward.cu (`_efficient_attention_backward`) with the workspace of mem_eff_attention/kernel_backward.h
(`Params::workspace_size`). Each pass is compiled in several variants, and takes the first one that is wide enough and
whose shared memory the card has. The bytes of shared memory are `sizeof(Kernel::SharedStorage)` of the headers that
come with PyTorch 2.14.1, compiled for the host.
"""

from __future__ import annotations

from typing import NamedTuple

from slicemod.call import AttentionShape
from slicemod.card import Card
from slicemod.rounding import ceil_div, round_up

_FLOAT = 4  # bytes of a float32, in which the kernel sums
_ANY_WIDTH = 2**16
_LSE_ALIGNMENT = 32  # rows, `kAlignLSE` of kernel_forward.h
_GRADIENT_ALIGNMENT = 16  # keys of the gradient of a mask
_MASK_ALIGNMENT = 8  # elements, `mem_eff_alignment` of attention.cpp
_MOST_SPLITS = 200  # of the keys over all heads, if gradients of keys need memory for each split
_WIDEST_IN_REGISTERS = 128  # channels; outputs of wider heads in half precision are summed in memory
_HEADER = 16  # bytes of a lock and a counter, before each block of the query's gradient
_WITHOUT_A_LIMIT = 2**30  # bytes, for a variant that has no dropout


class _Variant(NamedTuple):
    """A variant of the backward pass, a line of kernels/cutlassB.h.

    Attributes:
        rows: queries of a block (`kBlockSizeI`).
        keys: keys of a block (`kBlockSizeJ`).
        width: most channels of a head (`kMaxK`).
        shared: bytes of shared memory without dropout.
        shared_dropout: the same with dropout.
    """

    rows: int
    keys: int
    width: int
    shared: int
    shared_dropout: int


_HALF_70 = (
    _Variant(64, 64, 64, 25_088, 25_088),
    _Variant(128, 64, 128, 50_176, 50_176),
    _Variant(128, 64, _ANY_WIDTH, 50_176, 50_176),
)
_HALF_75 = (
    _Variant(64, 64, 64, 27_904, 27_904),
    _Variant(128, 64, 128, 54_784, 54_784),
    _Variant(128, 64, _ANY_WIDTH, 54_784, 54_784),
)
_ONLY_86_AND_89 = _Variant(128, 64, 96, 91_648, _WITHOUT_A_LIMIT)
_HALF_80 = (
    _Variant(64, 64, 32, 40_192, 40_192),
    _Variant(64, 64, 64, 44_288, 52_480),
    _ONLY_86_AND_89,
    _Variant(128, 128, 128, 154_112, 162_304),
    _Variant(64, 64, 128, 34_048, 34_048),
    _Variant(128, 64, _ANY_WIDTH, 60_928, 60_928),
    _Variant(64, 64, _ANY_WIDTH, 34_048, 34_048),
)
_SINGLE_BEFORE_80 = (_Variant(64, 64, _ANY_WIDTH, 37_120, 37_120),)
_SINGLE_80 = (
    _Variant(64, 64, 64, 53_504, 53_504),
    _Variant(128, 64, 128, 121_344, 121_344),
    _Variant(64, 64, 128, 67_840, 67_840),
    _Variant(128, 64, _ANY_WIDTH, 121_344, 121_344),
    _Variant(64, 64, _ANY_WIDTH, 67_840, 67_840),
)


def efficient_forward(shape: AttentionShape) -> int:
    """Bytes of the forward pass: wide outputs in half precision are summed in float32 (`output_accum`)."""
    wide = shape.itemsize < _FLOAT and max(shape.head_dim, shape.values) > _WIDEST_IN_REGISTERS
    return shape.batch_heads * shape.queries * shape.values * _FLOAT if wide else 0


def efficient_backward(shape: AttentionShape, card: Card, *, merged: bool, deterministic: bool) -> int:
    """Bytes of the backward pass: the row sums, the workspace, and what has another size than the gradient it becomes.

    Args:
        shape: sizes of the call.
        card: where it runs.
        merged: the gradient of the output lies as `(B, N, H, Dv)`; otherwise it is copied.
        deterministic: the keys are not split.
    """
    heads = shape.batch_heads
    copied = 0 if merged else heads * shape.queries * shape.values * shape.itemsize
    shared = 0  # gradients of key and value for each query head, which are then summed
    if shape.group > 1:
        shared = heads * shape.keys * (shape.head_dim + shape.values) * shape.itemsize
    sums = heads * shape.queries * _FLOAT
    workspace = _workspace(shape, card, deterministic=deterministic)
    if not _kernel_sums_rows(shape, card):
        # The sums of the rows are made from a product as large as the output, and are copied once.
        copies = 1 if shape.itemsize == _FLOAT else 3  # half precision is converted before
        workspace = max(workspace, copies * heads * shape.queries * shape.values * _FLOAT + sums)
    mask = _mask_gradient(shape)
    return mask + max(copied + sums + workspace + shared, 2 * _padded_mask(shape) if mask else 0)


def _workspace(shape: AttentionShape, card: Card, *, deterministic: bool) -> int:
    if card.capability is None:  # which kernel AMD's libraries have is not known, so the most that any takes
        variants = (*_HALF_80, *_HALF_75) if shape.itemsize < _FLOAT else _SINGLE_80
        fitting = [variant for variant in variants if variant.width >= max(shape.head_dim, shape.values)]
        return max(_workspace_of(shape, variant, deterministic=deterministic) for variant in fitting)
    return _workspace_of(shape, _variant(shape, card), deterministic=deterministic)


def _variant(shape: AttentionShape, card: Card) -> _Variant:
    """The first variant that can run, as `dispatch_cutlassB` tries them. The last one if none can."""
    capability = card.capability or (0, 0)
    variants: tuple[_Variant, ...]
    if shape.itemsize == _FLOAT:
        variants = _SINGLE_80 if capability >= (8, 0) else _SINGLE_BEFORE_80
    else:
        variants = _HALF_80 if capability >= (8, 0) else _HALF_75 if capability >= (7, 5) else _HALF_70
    for variant in variants:
        shared = variant.shared_dropout if shape.dropout else variant.shared
        offered = variant is not _ONLY_86_AND_89 or capability in ((8, 6), (8, 9))
        if offered and variant.width >= max(shape.head_dim, shape.values) and shared <= card.shared_memory:
            return variant
    return variants[-1]


def _workspace_of(shape: AttentionShape, variant: _Variant, *, deterministic: bool) -> int:
    """The gradient of the query in float32; those of key and value, too, if they do not stay in registers."""
    half = shape.itemsize < _FLOAT
    in_memory = half and not variant.width <= variant.rows
    splits = ceil_div(shape.keys, variant.keys)
    if shape.batch_heads >= 256 and shape.keys <= 2 * variant.keys:
        splits = 1
    if in_memory:
        splits = min(splits, _MOST_SPLITS // max(1, shape.batch_heads))
    splits = 1 if deterministic else max(1, splits)
    keys = 0
    if in_memory:
        width = round_up(shape.head_dim, variant.rows) + round_up(shape.values, variant.rows)
        keys = splits * variant.keys * width * _FLOAT
    blocks = ceil_div(shape.queries, variant.rows) * ceil_div(shape.head_dim, variant.keys)
    queries = blocks * (variant.rows * variant.keys * _FLOAT + _HEADER)
    return shape.batch_heads * (keys + queries)


def _kernel_sums_rows(shape: AttentionShape, card: Card) -> bool:
    """`kKernelComputesDelta` of kernel_backward.h."""
    if card.capability is None:
        return True
    if shape.itemsize == _FLOAT:
        return False
    variant = _variant(shape, card)
    return variant.width <= variant.rows or card.capability >= (7, 5)


def _mask_gradient(shape: AttentionShape) -> int:
    """The gradient of the mask for every score, before it is summed to the mask's own sizes."""
    if shape.mask is None or not shape.mask.has_grad:
        return 0
    return shape.batch_heads * shape.queries * round_up(shape.keys, _GRADIENT_ALIGNMENT) * shape.itemsize


def mask_bytes(shape: AttentionShape) -> int:
    """Bytes of the copies of a mask: a bool mask is converted, and rows that are not aligned are padded."""
    mask = shape.mask
    if mask is None:
        return 0
    converted = mask.elements * (shape.itemsize + 1) if mask.is_bool else 0
    return converted + _padded_mask(shape)


def _padded_mask(shape: AttentionShape) -> int:
    mask = shape.mask
    if mask is None or (mask.keys % _MASK_ALIGNMENT == 0 and not mask.unaligned):
        return 0
    rows = mask.batch * mask.heads * mask.queries
    return rows * (mask.keys + _MASK_ALIGNMENT - mask.keys % _MASK_ALIGNMENT) * shape.itemsize


def logsumexp_bytes(shape: AttentionShape) -> int:
    """Bytes of the statistics of the rows, which are kept for the backward pass."""
    return shape.batch_heads * round_up(shape.queries, _LSE_ALIGNMENT) * _FLOAT
