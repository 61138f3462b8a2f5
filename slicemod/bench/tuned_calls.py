"""Which calls `slicemod tune` measures: for each class of calls some sizes around those where a kernel may begin to pay
off, and how such a call is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from slicemod.call import AttentionShape, CallSpec, MaskShape, upcasts
from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.kernels.crossover_table import EXTRAS, CallClass, Corner, size_of

# The kernels that are measured, each against the one that `auto` would take without it; so the lower one comes first.
KERNELS = ("fused-float32", "native")
_HALF, _DTYPES = ("bfloat16", "float16"), ("float32", "bfloat16", "float16")
_DROPOUT = 0.1
_HEADS = 8

# The most channels of a class of calls, and how many are measured: those of Stable Diffusion and its VAE.
_WIDTHS = {64: 40, 128: 80, 256: 160, None: 512}
_EXTRAS_WIDTHS = {256: 64, None: 512}

# Queries and keys of calls with eight heads, and how many items and tokens many small sequences have, as the frames of
# a video.
_SIZES = [(queries, keys) for queries in (16, 64, 256, 1024) for keys in (16, 64, 77, 256, 512)]
_SMALL_SEQUENCES = [(128, 16), (32, 64)]
_EXTRAS_SIZES = [(queries, keys) for queries in (16, 64, 256) for keys in (16, 77, 256)]
_FLOAT32_SIZES = [(64, 77), (256, 77), (256, 256), (1024, 256)]
_WIDE_SIZES = [(64, 64), (256, 256), (1024, 1024)]  # of one head
_MOST_PRODUCTS = 2**26  # larger calls take long, and what is faster at this size stays so


class TunedCall(NamedTuple):
    """One call to measure.

    Attributes:
        calls: its class.
        shape: its sizes.
    """

    calls: CallClass
    shape: AttentionShape

    @property
    def size(self) -> Corner:
        """As corners tell it."""
        return size_of(self.shape)

    @property
    def spec(self) -> CallSpec:
        """As kernels are asked."""
        return CallSpec.planned(self.shape, "cpu", getattr(torch, self.calls.dtype), training=self.calls.training)

    def run_by(self, kernel: str) -> Callable[[], object]:
        """A function that runs it by a kernel: forward, and in training backward too. Tensors lie as a layer's do."""
        shape, training = self.shape, self.calls.training
        dtype: torch.dtype = getattr(torch, self.calls.dtype)
        slicing = SliceConfig(kernel=kernel)

        def tensor(tokens: int) -> Tensor:
            flat = torch.randn(shape.batch, tokens, shape.heads, shape.head_dim, device="cpu").to(dtype)
            return flat.transpose(1, 2).requires_grad_(training)

        query, key, value = tensor(shape.queries), tensor(shape.keys), tensor(shape.keys)
        mask = None
        if shape.mask is not None:
            mask = torch.randn(shape.batch, 1, shape.queries, shape.keys, device="cpu").to(dtype)
            mask.requires_grad_(shape.mask.has_grad)
        dropout = _DROPOUT if shape.dropout else 0.0

        def forward() -> Tensor:
            return sliced_attention(query, key, value, mask, dropout, shape.causal, slicing=slicing)

        if not training:
            return torch.no_grad()(forward)
        wanted = [given for given in (query, key, value, mask) if given is not None and given.requires_grad]
        gradient = torch.randn(shape.batch, shape.queries, shape.heads, shape.head_dim, device="cpu").to(dtype)
        gradient = gradient.transpose(1, 2)
        return lambda: torch.autograd.grad(forward(), wanted, gradient)


def tuned_calls() -> Iterator[list[TunedCall]]:
    """The calls of each group: the classes that differ in the width of heads alone."""
    for kernel in KERNELS:
        dtypes = _HALF if kernel == "fused-float32" else _DTYPES
        for extra in reversed(EXTRAS):
            for dtype in dtypes:
                for training in (False, True):
                    if training or extra != "mask gradient":
                        yield list(_group(CallClass(kernel, dtype, training, extra, None)))


def _group(calls: CallClass) -> Iterator[TunedCall]:
    few = calls.kernel == "fused-float32"
    plain = calls.extra == "plain" and not few
    for width, measured in (_WIDTHS if plain else _EXTRAS_WIDTHS).items():
        own = calls._replace(width=width)
        if width is None:
            sizes = [(1, 1, *pair) for pair in (_WIDE_SIZES if plain else _WIDE_SIZES[1:2])]
        else:
            pairs = _SIZES if plain else _FLOAT32_SIZES if few else _EXTRAS_SIZES
            sizes = [(1, _HEADS, *pair) for pair in pairs]
            sizes += [(items, _HEADS, tokens, tokens) for items, tokens in (_SMALL_SEQUENCES if plain else ())]
        for batch, heads, queries, keys in sizes:
            shape = _with_extra(AttentionShape(batch, heads, queries, keys, measured, 4), calls)
            if width is None or size_of(shape).products <= _MOST_PRODUCTS:
                yield TunedCall(own, shape)


def _with_extra(shape: AttentionShape, calls: CallClass) -> AttentionShape:
    itemsize = getattr(torch, calls.dtype).itemsize
    mask = None
    if "mask" in calls.extra:
        mask = MaskShape(shape.batch, 1, shape.queries, shape.keys, has_grad=calls.extra == "mask gradient")
    return replace(
        shape,
        itemsize=itemsize,
        upcast=upcasts("cpu", itemsize),
        causal=calls.extra == "causal",
        dropout=calls.extra == "dropout",
        mask=mask,
    )
