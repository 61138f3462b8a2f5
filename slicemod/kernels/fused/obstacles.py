"""Why PyTorch would not run a fused kernel for a call: by the conditions in its sources, or by its own answer."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from slicemod.call import CallSpec, constant_bool
from slicemod.kernels.fused.cuda_bytes import CUDA_KERNELS, CUDNN, EFFICIENT, FLASH
from slicemod.kernels.fused.cuda_conditions import efficient_refuses, flash_refuses, kernels_of_card
from slicemod.kernels.fused.metal_attention import metal_refuses
from slicemod.kernels.fused.running import BACKENDS, counts_cudnn, pytorchs_choice
from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.torch_internals import PYTORCH, FakeTensor, FakeTensorMode
from slicemod.watched import PlainValues, constant_in_graph, is_watched

_FIRST_GRADIENT_OF_A_MASK_ALONE = (2, 14)  # pytorch/pytorch#188302


def fused_obstacle(call: CallSpec) -> str | None:
    """Why `F.scaled_dot_product_attention` would not run a fused kernel, or None if it would.

    For CPUs the conditions are those in ATen/native/transformers/sdp_utils_cpp.cpp of PyTorch. On CUDA and ROCm PyTorch
    itself answered when the call was described (`Layout.runs`), or its conditions do (`cuda_conditions.py`). On MPS
    they are those of `metal_attention.py`. On other devices it cannot be known beforehand what PyTorch chooses, which
    is an obstacle.
    """
    shape, layout, device = call.shape, call.layout, call.device.type
    if device not in (*BACKENDS, "mps"):
        return f"it is not known whether PyTorch runs a fused kernel on {device!r}"
    if layout.dims not in (3, 4):
        return f"fused kernels want (B, H, N, D) or (H, N, D), and query has {layout.dims} dimensions"
    if not layout.same_batch:
        return "fused kernels want the same batch for query, key and value"
    if not layout.same_heads:
        return "fused kernels want the same heads for query, key and value"
    if shape.keys == 1 and call.training:
        return "fused kernels give query and key noise for a gradient, which is zero where there is one key"
    if not layout.contiguous:
        return "fused kernels want the last dimension contiguous"
    if shape.mask is not None:
        if layout.dims == 4 and layout.mask_dims not in (2, 4):
            return f"fused kernels want a mask of 2 or 4 dimensions, got {layout.mask_dims}"
        if shape.mask.other_dtype and not shape.mask.is_bool:
            return f"fused kernels want a mask of bool or {call.dtype}, got one of another dtype"
    if shape.causal and not call.ordinary_scale:
        return "fused kernels multiply the -inf of later keys by the scale, which is not positive"
    if device == "mps":
        return metal_refuses(call)
    return _cpu_obstacle(call) if device == "cpu" else _cuda_obstacle(call)


def _cpu_obstacle(call: CallSpec) -> str | None:
    shape = call.shape
    if shape.values != shape.head_dim:
        return f"the CPU's fused kernel wants values as wide as queries, got {shape.values} and {shape.head_dim}"
    if shape.mask is not None and call.layout.mask_requires_grad:  # PyTorch declines under no_grad too
        return "the CPU's fused kernel gives the mask no gradient"
    return "the CPU's fused kernel has no dropout" if shape.dropout else None


def _cuda_obstacle(call: CallSpec) -> str | None:
    shape, layout = call.shape, call.layout
    if shape.mask is not None and shape.mask.keys < shape.keys:
        return "PyTorch's CUDA kernels raise an error for a mask that is broadcast along the keys"
    if layout.only_mask_requires_grad and call.training and PYTORCH < _FIRST_GRADIENT_OF_A_MASK_ALONE:
        return "before PyTorch 2.14, a CUDA kernel crashes where nothing but the mask requires a gradient"
    if layout.runs is None:
        return None if kernels_of_card(call) else _refusals(call)
    if layout.runs:
        return None
    if flash_refuses(call) is not None and efficient_refuses(call) is not None:
        return _refusals(call)
    return "PyTorch says that neither flash nor memory-efficient attention takes the call"


def _refusals(call: CallSpec) -> str:
    flash, efficient = flash_refuses(call), efficient_refuses(call)
    return f"PyTorch has no fused CUDA kernel for it. Flash attention: {flash}. Memory-efficient attention: {efficient}"


def layout_of(inputs: Inputs, arguments: Arguments) -> PlainValues:
    """The fields of `Layout` for the caller's tensors.

    They are plain values, also while a graph is traced.
    """
    query, key, value, mask = inputs
    same_batch = query.dim() != 4 or (key.shape[0] == query.shape[0] and value.shape[0] == query.shape[0])
    same_heads = (
        query.dim() < 3
        or arguments.enable_gqa
        or (key.shape[-3] == query.shape[-3] and value.shape[-3] == query.shape[-3])
    )
    contiguous = query.stride(-1) == 1 and key.stride(-1) == 1 and value.stride(-1) == 1
    on_cuda = query.is_cuda and query.dim() in (3, 4)
    mask_requires_grad = mask is not None and mask.requires_grad
    return (
        query.dim(),
        0 if mask is None else mask.dim(),
        constant_bool(contiguous),
        constant_bool(same_batch),
        constant_bool(same_heads),
        mask_requires_grad,
        mask_requires_grad and not any(tensor.requires_grad for tensor in (query, key, value)),
        constant_bool(_is_merged(query)) if on_cuda or (query.is_meta and not torch.compiler.is_compiling()) else True,
        kernels_on_cuda(inputs, arguments) if on_cuda else None,
        pytorchs_choice(inputs, arguments) if on_cuda and not is_watched(query, key, value) else None,
    )


def _is_merged(query: Tensor) -> bool:
    """The query lies as `(B, N, H, D)`, and so will the output of flash attention, which keeps the order of strides."""
    if query.dim() < 3:
        return True
    heads, rows = query.shape[-3], query.shape[-2]
    by_rows = heads == 1 or rows == 1 or query.stride(-2) >= query.stride(-3) > 0
    batches = query.dim() == 3 or query.shape[0] == 1 or query.stride(0) >= max(query.stride(1), query.stride(2))
    return by_rows and batches


def kernels_on_cuda(inputs: Inputs, arguments: Arguments) -> tuple[str, ...]:
    """Those of `CUDA_KERNELS` that take these arguments of `F.scaled_dot_product_attention`, as PyTorch says.

    cuDNN's is left out where it is not known what it allocates.
    """
    # In a graph, `if` and bool() make them constants. Of the dropout PyTorch only wants to know whether there is any.
    settings = 0.5 if arguments.dropout_p > 0 else 0.0, bool(arguments.is_causal), bool(arguments.enable_gqa)
    if not torch.compiler.is_dynamo_compiling():
        with_cudnn = counts_cudnn(inputs, arguments)
        return tuple(name for name in _ask_pytorch(*inputs, *settings) if with_cudnn or name != CUDNN)
    described = tuple(None if tensor is None else _description(tensor) for tensor in inputs)
    runs = _ask_outside_of_the_graph(described, settings, torch.is_grad_enabled())
    return tuple(name for name in runs if name != CUDNN)  # a graph runs no cuDNN


def _ask_pytorch(*inputs: Any) -> tuple[str, ...]:
    params = torch.backends.cuda.SDPAParams(*inputs)
    asked = {
        FLASH: torch.backends.cuda.can_use_flash_attention,
        EFFICIENT: torch.backends.cuda.can_use_efficient_attention,
        CUDNN: torch.backends.cuda.can_use_cudnn_attention,
    }
    return tuple(name for name in CUDA_KERNELS if asked[name](params))


def _description(tensor: Tensor) -> PlainValues:
    """Everything of a tensor that PyTorch looks at, as constants if a graph is traced."""
    shape, stride = tuple(index(size) for size in tensor.shape), tuple(index(step) for step in tensor.stride())
    return shape, stride, tensor.dtype, str(tensor.device), tensor.requires_grad


@constant_in_graph
def _ask_outside_of_the_graph(
    described: tuple[PlainValues | None, ...], settings: tuple[float, bool, bool], grad_enabled: bool
) -> tuple[str, ...]:
    """`_ask_pytorch` for descriptions of tensors, because not every version of PyTorch can trace these questions."""
    tensors = [None if description is None else _stand_in(description) for description in described]
    with torch.set_grad_enabled(grad_enabled):
        return _ask_pytorch(*tensors, *settings)


def _stand_in(description: PlainValues) -> Tensor:
    """A tensor without memory, that looks as described."""
    shape, stride, dtype, device, requires_grad = description
    on_meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    stand_in: Tensor = FakeTensor(FakeTensorMode(), on_meta, torch.device(device))
    return stand_in.requires_grad_(requires_grad)
