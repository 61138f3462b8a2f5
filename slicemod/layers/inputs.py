"""Checks the inputs of attention, casts them under autocast, and views them as `(B, H, N, D)`."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from slicemod.torch_internals import differentiates_forward, is_any_autocast_enabled
from slicemod.watched import constant_in_graph

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> None:
    """Raises if no attention can be computed of these inputs.

    Raises:
        ValueError: sizes, dtypes, devices or settings do not go together. The message names the argument.
        NotImplementedError: an input carries a tangent of forward-mode differentiation.
    """
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.dim() < 2:
            raise ValueError(
                f"{name}: expected (..., tokens, width), at least 2 dimensions; got {tuple(tensor.shape)}. "
                "Add the token dimension."
            )
        if tensor.dtype not in _DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name}: expected a floating-point dtype, the same for query, key and value; got {tensor.dtype} "
                f"(query is {query.dtype}). Cast them to one dtype."
            )
        if tensor.device != query.device or tensor.dim() != query.dim():
            raise ValueError(
                f"{name}: expected as many dimensions as query, on its device; got {tensor.dim()} on "
                f"{tensor.device} (query has {query.dim()} on {query.device}). Move or reshape it."
            )
    if key.shape[-1] != query.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "query, key, value: expected query (..., N, D), key (..., M, D), value (..., M, Dv); got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}. Check D of key and M of value."
        )
    if differentiates_forward() and any(_has_tangent(tensor) for tensor in named.values()):
        raise NotImplementedError(
            "query, key, value: expected tensors without tangents; got forward-mode differentiation (jvp, jacfwd), "
            "which sliced attention does not have. Use reverse mode: torch.func.vjp, jacrev or backward()."
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1; got {dropout_p}. Pass for example 0.1.")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError(
            "is_causal: expected no attn_mask together with is_causal=True; got both. Put the causal mask into "
            "attn_mask."
        )
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) or attn_mask.device != query.device:
        raise ValueError(
            f"attn_mask: expected bool, float32 or {query.dtype} on {query.device}; got {attn_mask.dtype} on "
            f"{attn_mask.device}. Cast or move it; mask.bool() keeps where it is not 0."
        )


def _has_tangent(tensor: Tensor) -> bool:
    unpack: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual
    return unpack(tensor)[1] is not None


def autocast_inputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs as SDPA's autocast casts them: floating-point tensors, except float64, get the autocast dtype."""
    if not is_any_autocast_enabled():  # faster than the questions below
        return query, key, value, attn_mask
    device = query.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(device)
    return _cast(query, dtype), _cast(key, dtype), _cast(value, dtype), _cast(attn_mask, dtype)


@constant_in_graph
def _has_autocast(device: str) -> bool:
    """Before PyTorch 2.13 its compiler cannot trace this question."""
    return torch.amp.is_autocast_available(device)


def _cast(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def as_four_dims(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs as `(B, H, N, D)`, `(B, Hk, M, D)`, `(B, Hk, M, Dv)` and a mask with 4 dimensions.

    Raises:
        ValueError: the sizes of key, value or mask do not go with those of query.
    """
    lead, heads = query.shape[:-3], query.shape[-3:-2]
    key_heads = key.shape[-3:-2] if enable_gqa else heads
    try:
        key = key.expand(*lead, *key_heads, *key.shape[-2:])
        value = value.expand(*lead, *key_heads, *value.shape[-2:])
    except RuntimeError as error:
        raise ValueError(
            f"key, value: expected heads and batch of query {tuple(query.shape)}; got {tuple(key.shape)} and "
            f"{tuple(value.shape)}. Pass enable_gqa=True where key and value share heads."
        ) from error
    if enable_gqa and heads and (not key_heads or heads[0] % key_heads[0]):
        raise ValueError(
            f"key: expected a number of heads that divides query's {heads[0]}; got {key.shape[-3]}. "
            "Grouped-query attention shares each key head among as many query heads."
        )
    if attn_mask is not None:
        scores = (*query.shape[:-1], key.shape[-2])
        try:
            attn_mask.expand(scores)
        except RuntimeError as error:
            raise ValueError(
                f"attn_mask: expected a shape broadcastable to {tuple(scores)}; got {tuple(attn_mask.shape)}. "
                "Its last two dimensions are queries and keys."
            ) from error
        attn_mask = attn_mask.reshape(*[1] * (4 - attn_mask.dim()), *attn_mask.shape)
        if len(lead) > 1:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    return _four_dims(query), _four_dims(key), _four_dims(value), attn_mask


def _four_dims(tensor: Tensor) -> Tensor:
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor.reshape(*[1] * (4 - tensor.dim()), *tensor.shape) if tensor.dim() < 4 else tensor
