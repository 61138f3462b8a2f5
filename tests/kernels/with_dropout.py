"""Exact attention of which some weights are dropped, where it is known which."""

from __future__ import annotations

import torch
from torch import Tensor

from slicemod.reference import reference_attention


def with_dropout(
    factors: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Exact attention whose weights are multiplied by `factors`, as a function of all inputs."""
    # The weights are the attention of values that are the rows of an identity.
    batch, _, keys, _ = key.shape
    heads, queries = query.shape[1:3]
    identity = torch.eye(keys, dtype=torch.float64, device=query.device).expand(batch, key.shape[1], keys, keys)
    weights = reference_attention(query, key, identity, mask, is_causal, enable_gqa=True)
    values = value.double().repeat_interleave(heads // value.shape[1], 1)
    return (weights * factors.view(batch, heads, queries, keys)) @ values
