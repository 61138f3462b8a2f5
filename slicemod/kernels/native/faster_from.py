"""From which size on the native kernel is faster than PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from slicemod.call import CallSpec
from slicemod.kernels.native.binding import TILED_MODE, NativeLibrary

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


def is_faster(call: CallSpec, library: NativeLibrary) -> bool:
    """Whether the native kernel is faster than PyTorch's for a call that it can run."""
    shape, dtype = call.shape, call.dtype
    if shape.keys < _LEAST_NATIVE_KEYS:
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
