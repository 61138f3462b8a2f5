"""The bytes that PyTorch's fused CUDA kernels allocate: the most that any of those takes that can run a call.

Which of flash, memory-efficient and cuDNN attention runs depends on PyTorch's version and settings. A plan has to hold
for all that can run. The numbers follow PyTorch's sources (`flash_bytes.py`, `efficient_bytes.py`), and were compared
with what PyTorch's allocator was asked for on an H200 (`tests/kernels/fused/test_cuda_bytes.py` has the measurements,
and for other cards the numbers with their sources).

cuDNN chooses its workspace itself, so its bytes cannot be known from sources. They were measured on an H200, for calls
without mask, dropout and shared heads: never more than flash attention takes. Elsewhere cuDNN attention is left out
(`cudnn_is_known`).
"""

from __future__ import annotations

from slicemod.call import CallSpec
from slicemod.card import Card
from slicemod.kernels.fused.efficient_bytes import efficient_backward, efficient_forward, logsumexp_bytes, mask_bytes
from slicemod.kernels.fused.flash_bytes import flash_backward, flash_forward

FLASH, EFFICIENT, CUDNN = "flash", "efficient", "cudnn"
CUDA_KERNELS = (FLASH, EFFICIENT, CUDNN)

_SCALARS = 2048  # bytes of seeds, offsets and single numbers; each has an allocation of its own
_CUDNN_MEASURED = ((9, 0),)  # compute capabilities
_CUDNN_WIDEST = 128  # channels of a head that were measured


def cudnn_is_known(card: Card, head_dim: int, value_dim: int, *, plain: bool) -> bool:
    """Whether the bytes of cuDNN's attention were measured for calls like this one.

    Args:
        card: where it runs.
        head_dim: channels of a head's queries and keys.
        value_dim: channels of a head's values.
        plain: without a mask, without dropout, and with a key head for each query head.
    """
    return plain and card.capability in _CUDNN_MEASURED and head_dim == value_dim <= _CUDNN_WIDEST


def cuda_fused_peak(call: CallSpec, runs: tuple[str, ...]) -> int:
    """Peak bytes beyond inputs, output and input gradients, of the kernels `runs` among `CUDA_KERNELS`.

    In training the forward pass counts too, because it can take more than the backward pass if it splits the keys.
    """
    shape, card, merged, deterministic = call.shape, call.card, call.layout.merged, call.deterministic
    peaks = [0]
    if EFFICIENT in runs:
        peaks.append(efficient_forward(shape))
        if call.training:
            peaks.append(efficient_backward(shape, card, merged=merged, deterministic=deterministic))
    if FLASH in runs or CUDNN in runs:
        peaks.append(flash_forward(shape, card))
        if call.training:
            peaks.append(flash_backward(shape, card, merged=merged, deterministic=deterministic))
    return logsumexp_bytes(shape) + mask_bytes(shape) + max(peaks) + _SCALARS
