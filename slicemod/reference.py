"""Attention without slices, as readable as possible. The tests compare with it; optimised code never imports it."""

import math

import torch
from torch import Tensor


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`softmax(scale * query key^T + attn_mask) value` in `dtype`, all scores at once.

    Args:
        query: `(..., H, N, D)`.
        key: `(..., H, M, D)`. With `enable_gqa` it may have fewer heads, a divisor of `H`.
        value: `(..., H, M, Dv)`, with as many heads as key.
        attn_mask: broadcastable to `(..., H, N, M)`. Bool, True where a query may look; or added to the scores.
        is_causal: query `i` sees keys `0..i`.
        scale: factor of the scores; `1 / sqrt(D)` when left out.
        enable_gqa: repeat the heads of key and value until there are as many as of query.
        dtype: the dtype in which everything is computed.

    Returns:
        `(..., H, N, Dv)` in `dtype`. A row that may look at no key is zero, as in SDPA. It can be differentiated any
        number of times.
    """
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * query @ key.transpose(-2, -1)  # (..., H, N, M)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, -math.inf)
    if attn_mask is not None:
        scores = scores + attn_mask.to(dtype)
    dead_rows = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead_rows, 0), -1).masked_fill(dead_rows, 0)
    return weights @ value
