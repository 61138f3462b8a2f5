"""PyTorch's fused attention: when it is certain to run, and running it so that nothing else can."""

from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.watched import constant_in_graph, is_watched

# "math" is left out: it would materialise the scores that a plan promises not to.
_FUSED_BACKENDS = {
    "cpu": [SDPBackend.FLASH_ATTENTION],
    "cuda": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}
_CHOICES = {device: {backend.value for backend in backends} for device, backends in _FUSED_BACKENDS.items()}


def fused_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> str | None:
    """Why `F.scaled_dot_product_attention` would not run a fused kernel on these inputs, or None if it would.

    Args: as there, with the inputs as they came.

    The conditions are those of ATen/native/transformers/sdp_utils_cpp.cpp for the CPU; on CUDA and ROCm PyTorch
    answers itself. Devices whose choice cannot be known beforehand count as obstacles.
    """
    device = query.device.type
    if device not in _FUSED_BACKENDS:
        return f"it is not known whether PyTorch runs a fused kernel on {device!r}"
    if query.dim() not in (3, 4):
        return f"fused kernels want (B, H, N, D) or (H, N, D), and query has {query.dim()} dimensions"
    if query.dim() == 4 and (key.shape[0] != query.shape[0] or value.shape[0] != query.shape[0]):
        return "fused kernels want the same batch for query, key and value"
    if not enable_gqa and (key.shape[-3] != query.shape[-3] or value.shape[-3] != query.shape[-3]):
        return "fused kernels want the same heads for query, key and value"
    if key.shape[-2] == 1 and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "fused kernels give query and key noise for a gradient, which is zero where there is one key"
    if query.shape[-1] != value.shape[-1]:
        return f"fused kernels want values as wide as queries, got {value.shape[-1]} and {query.shape[-1]}"
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        return "fused kernels want the last dimension contiguous"
    if attn_mask is not None and (obstacle := _mask_obstacle(attn_mask, query)) is not None:
        return obstacle
    if device == "cpu":
        return f"the CPU's fused kernel has no dropout, and dropout_p is {dropout_p}" if dropout_p > 0 else None
    if torch.compiler.is_dynamo_compiling():
        mask = None if attn_mask is None else _description(attn_mask)
        described = _description(query), _description(key), _description(value), mask
        # Branches make constants of them in the graph; of dropout PyTorch asks only whether there is any.
        settings = 0.5 if dropout_p > 0 else 0.0, bool(is_causal), bool(enable_gqa)
        fuses = _would_fuse_on_cuda(described, settings, torch.is_grad_enabled())
    else:
        fuses = _fuses_on_cuda(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    return None if fuses else "PyTorch has no fused CUDA kernel for these sizes, this dtype or this GPU"


def _fuses_on_cuda(*inputs: Any) -> bool:
    """Any of the CUDA kernels takes these arguments of `F.scaled_dot_product_attention`."""
    params = torch.backends.cuda.SDPAParams(*inputs)
    return (
        torch.backends.cuda.can_use_flash_attention(params)
        or torch.backends.cuda.can_use_efficient_attention(params)
        or torch.backends.cuda.can_use_cudnn_attention(params)
    )


def _description(tensor: Tensor) -> tuple[Any, ...]:
    """All that PyTorch looks at, as constants of a graph that is traced."""
    shape, stride = tuple(index(size) for size in tensor.shape), tuple(index(step) for step in tensor.stride())
    return shape, stride, tensor.dtype, str(tensor.device), tensor.requires_grad


@constant_in_graph
def _would_fuse_on_cuda(
    described: tuple[tuple[Any, ...] | None, ...], settings: tuple[float, bool, bool], grad_enabled: bool
) -> bool:
    """`_fuses_on_cuda` of descriptions, outside of the graph: not every version of PyTorch can trace the questions."""
    tensors = [None if description is None else _stand_in(description) for description in described]
    with torch.set_grad_enabled(grad_enabled):
        return _fuses_on_cuda(*tensors, *settings)


def _stand_in(description: tuple[Any, ...]) -> Tensor:
    """A tensor without memory."""
    shape, stride, dtype, device, requires_grad = description
    on_meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    stand_in: Tensor = FakeTensor(FakeTensorMode(), on_meta, torch.device(device))
    return stand_in.requires_grad_(requires_grad)


def _mask_obstacle(attn_mask: Tensor, query: Tensor) -> str | None:
    if query.dim() == 4 and attn_mask.dim() not in (2, 4):
        return f"fused kernels want a mask of 2 or 4 dimensions, got {attn_mask.dim()}"
    if attn_mask.dtype not in (torch.bool, query.dtype):
        return f"fused kernels want a mask of bool or {query.dtype}, got {attn_mask.dtype}"
    if attn_mask.requires_grad:  # PyTorch declines under no_grad too
        return "fused kernels give the mask no gradient"
    return None


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`F.scaled_dot_product_attention` by a fused kernel; arguments as there, `(B, H, N, D)` in and out.

    Raises:
        RuntimeError: PyTorch has no fused kernel for these inputs after all.
    """
    call = query, key, value, attn_mask, dropout_p, is_causal
    # To ask what PyTorch is about to choose costs a tenth of seeing to it that it has no other choice.
    if not is_watched(query, key, value) and is_fused(pytorchs_choice(*call, scale, enable_gqa), query):
        return F.scaled_dot_product_attention(*call, scale=scale, enable_gqa=enable_gqa)
    with sdpa_kernel(_FUSED_BACKENDS[query.device.type]):
        return F.scaled_dot_product_attention(*call, scale=scale, enable_gqa=enable_gqa)


def pytorchs_choice(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> int:
    """The value of the `SDPBackend` that `F.scaled_dot_product_attention` runs, as PyTorch is set now."""
    choice: int = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return choice


def is_fused(choice: int, query: Tensor) -> bool:
    """What `pytorchs_choice` answered is a fused kernel of the query's device."""
    return choice in _CHOICES[query.device.type]


def flash_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """What `fused_attention` runs on the CPU without a mask, for inputs that PyTorch would take for it.

    It is not asked again: it was when an earlier call with inputs of these sizes, strides and dtypes was planned.
    """
    output: Tensor = torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)[
        0
    ]
    return output
