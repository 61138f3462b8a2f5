"""Which of PyTorch's fused CUDA kernels take a call, by the conditions in PyTorch's sources.

Where there is a GPU, PyTorch itself is asked (`obstacles.py`). These conditions are for calls that are only planned,
and say why in words. They are those of ATen/native/transformers/cuda/sdp_utils.cpp, PyTorch 2.9 to 2.14:
`can_use_flash_attention` and `can_use_mem_efficient_attention`, with the checks that they list.
"""

from __future__ import annotations

import torch

from slicemod.call import CallSpec, dtype_name
from slicemod.kernels.fused.cuda_bytes import CUDNN, EFFICIENT, FLASH, cudnn_is_known
from slicemod.torch_internals import PYTORCH

_FIRST_GQA_IN_EFFICIENT = (2, 14)  # pytorch/pytorch#191085
_NEWEST = (12, 1)  # the newest compute capability that PyTorch's checks know
_HALF = (torch.float16, torch.bfloat16)


def kernels_of_card(call: CallSpec) -> tuple[str, ...]:
    """Those of `CUDA_KERNELS` that take the call on its card. AMD's are taken to do what NVIDIA's newest do."""
    runs = []
    if flash_refuses(call) is None:
        runs.append(FLASH)
    if efficient_refuses(call) is None:
        runs.append(EFFICIENT)
    shape = call.shape
    plain = shape.mask is None and not shape.dropout and shape.group == 1
    if FLASH in runs and cudnn_is_known(call.card, shape.head_dim, shape.values, plain=plain):
        runs.append(CUDNN)
    return tuple(runs)


def flash_refuses(call: CallSpec) -> str | None:
    """Why flash attention does not take the call."""
    shape, capability = call.shape, call.card.capability or _NEWEST
    if call.dtype not in _HALF:
        return f"it has no {dtype_name(call.dtype)}"
    if not (8, 0) <= capability <= _NEWEST:
        return f"it wants a compute capability from 8.0 to 12.1, {call.card.name} has {_dotted(capability)}"
    if shape.mask is not None:
        return "it has no mask"
    if shape.values != shape.head_dim or shape.head_dim > 256:
        return f"it wants heads of one width up to 256, got {shape.head_dim} and {shape.values}"
    small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    if call.training and small and shape.head_dim > 192 and (shape.head_dim <= 224 or shape.dropout):
        return f"it has no backward pass for heads of {shape.head_dim} on {call.card.name}"
    if shape.causal and shape.queries != shape.keys:
        return f"with is_causal it wants as many queries as keys, got {shape.queries} and {shape.keys}"
    return None


def efficient_refuses(call: CallSpec) -> str | None:
    """Why the memory-efficient kernel does not take the call."""
    shape, capability = call.shape, call.card.capability or _NEWEST
    dtypes = (torch.float32, *_HALF) if capability >= (8, 0) else (torch.float32, torch.float16)
    if call.dtype not in dtypes:
        return f"it has no {dtype_name(call.dtype)} on {call.card.name}"
    if not (5, 0) <= capability <= _NEWEST:
        return f"it wants a compute capability from 5.0 to 12.1, {call.card.name} has {_dotted(capability)}"
    aligned = _alignment(call.dtype, capability)
    if shape.head_dim % aligned or shape.values % aligned:
        return f"it wants widths that are multiples of {aligned}, got {shape.head_dim} and {shape.values}"
    if shape.group > 1 and PYTORCH < _FIRST_GQA_IN_EFFICIENT:
        return f"before PyTorch {_dotted(_FIRST_GQA_IN_EFFICIENT)} it wants a key head for each query head"
    return None


def _alignment(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """`minimum_gemm_alignment` of sdp_utils.cpp, in elements."""
    half = dtype.itemsize == 2
    tensor_cores = capability >= (8, 0) or (half and capability >= (7, 0))
    least = 4 if capability >= (8, 0) else 1
    return max(least, 16 // dtype.itemsize) if tensor_cores else least


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
