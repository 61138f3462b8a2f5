"""What PyTorch's CPU operators allocate within themselves, as far as a UNet's peak shows it.

Read off the allocator on x86 with oneDNN: a convolution copies weights and input into blocks of channels, computes
into such blocks, and copies those into the output. A matrix product needs a few hundred KiB, which are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def cpu_temporaries(func: Any, args: Sequence[Any], result: Any) -> Sequence[int]:
    """Bytes beyond the results that an operator holds for a while; several where one follows the other."""
    if func is _aten.convolution.default:
        image, weight = args[:2]  # (B, C, h, w), (C', C, kh, kw)
        return image.nbytes + weight.nbytes, result.nbytes
    if func is _aten.upsample_nearest2d.default or func is _aten.upsample_nearest2d.vec:
        return () if args[0].is_contiguous() else (args[0].nbytes + result.nbytes,)
    if func is _aten.native_layer_norm.default:
        return () if args[0].is_contiguous() else (args[0].nbytes,)
    return ()


def no_temporaries(_func: Any, _args: Sequence[Any], _result: Any) -> Sequence[int]:
    """For devices whose operators nobody looked into."""
    return ()
