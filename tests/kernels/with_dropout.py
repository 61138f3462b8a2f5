"""Exact attention of which some weights are dropped, where it is known which."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slicemod.reference import reference_attention
from tests.oracle import Attention, Inputs, error, layer_like, results


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


def assert_as_exact_as_what_is_left(attention: Attention, inputs: Inputs, factors: Tensor, dropout_p: float) -> None:
    """Output and gradients with dropout are near to those of the known factors.

    SDPA's error is that without dropout, which the kept weights enlarge.
    """
    dtype = inputs.query.dtype

    def exactly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        return with_dropout(factors, query, key, value, mask, settings["is_causal"])

    batch, heads, queries, _ = inputs.query.shape
    grad = layer_like(batch, heads, queries, inputs.value.shape[3], dtype)
    exact, found = results(exactly, inputs.leaves(torch.float64), grad), results(attention, inputs.leaves(), grad)
    theirs = results(F.scaled_dot_product_attention, inputs.leaves(), grad)
    undropped = results(reference_attention, inputs.leaves(torch.float64), grad)
    for name, result in found.items():
        ulp = torch.finfo(dtype).eps * float(exact[name].norm())
        allowed = 2.5 * error(theirs[name], undropped[name]) / (1 - dropout_p) + ulp / 2
        assert error(result, exact[name]) <= allowed, name
