"""PyTorch's attention on Metal that keeps no scores: when it is certain to run, and its bytes.

The operator is `_scaled_dot_product_attention_math_for_mps`. In spite of its name it runs `sdpa_prefill_mps` where the
conditions below hold, and otherwise a graph that makes all scores. They are those of ATen/native/mps/operations/
Attention.mm and of mps/kernels/PrefillAttention.h, PyTorch 2.14. Nothing of this was run.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from slicemod.call import AttentionShape, CallSpec, dtype_name
from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.torch_internals import PYTORCH, metal_attention_operator

_FIRST = (2, 14)
_WIDTHS = (32, 64, 72, 80, 96, 128, 256)  # `prefill_attention_supports_head_dim`
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_SHORT_QUERIES = 8  # up to here other kernels run, which make a tensor for all scores
_SWITCH = "PYTORCH_MPS_DISABLE_PREFILL_ATTENTION"


def metal_refuses(call: CallSpec) -> str | None:
    """Why PyTorch would make all scores for the call on Metal, or not compute it; None if it keeps none."""
    shape = call.shape
    if PYTORCH < _FIRST or metal_attention_operator is None:
        return "before PyTorch 2.14, PyTorch makes all scores on Metal"
    if os.environ.get(_SWITCH, "0") != "0":
        return f"with {_SWITCH} set, PyTorch makes all scores on Metal"
    if call.training or call.transformed:
        return "PyTorch makes all scores on Metal where gradients are needed"
    if shape.dropout:
        return "PyTorch has no dropout on Metal"
    if shape.mask is not None:
        return "PyTorch's kernel for Metal gives NaN for a row that may look at no key"
    if call.dtype not in _DTYPES:
        return f"PyTorch's kernel for Metal has no {dtype_name(call.dtype)}"
    if shape.values != shape.head_dim or shape.head_dim not in _WIDTHS:
        widths = ", ".join(map(str, _WIDTHS))
        return f"PyTorch's kernel for Metal wants widths of {widths}, got {shape.head_dim} and {shape.values}"
    if shape.queries <= _MOST_SHORT_QUERIES:
        return f"PyTorch makes all scores on Metal for up to {_MOST_SHORT_QUERIES} queries"
    return None


def metal_peak(shape: AttentionShape) -> int:
    """Bytes beyond inputs and output: the output as PyTorch makes it, before it is laid out as `(B, N, H, D)`."""
    return shape.batch_heads * shape.queries * shape.values * shape.itemsize


def metal_attention(inputs: Inputs, more: Arguments) -> Tensor:
    """Attention by PyTorch's operator for Metal, laid out as `(B, N, H, D)`."""
    query, key, value, _ = inputs
    found: Tensor = metal_attention_operator(query, key, value, None, 0.0, more.is_causal, None, scale=more.scale)[0]
    return found.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
