"""What a call of attention may have beside query, key and value, for kernels that compute all of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.oracle import Inputs, layer_inputs, layer_like

# More rows and keys than a tile of the Triton kernel has, or fewer.
SIZES = {"long": (71, 131), "wide": (67, 29), "short": (13, 73)}


def masks(queries: int, keys: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Masks for 2 batch items of 2 heads."""
    dead = torch.rand(2, 1, queries, keys) > 0.3
    dead[0, :, 4:7] = False
    additive = torch.zeros(2, 1, queries, keys).masked_fill(~dead, -math.inf)
    return {
        "none": None,
        "bool": torch.rand(queries, keys) > 0.3,
        "bool per key and item": torch.rand(2, 1, 1, keys) > 0.3,
        "bool per row": torch.ones(2, 2, queries, 1, dtype=torch.bool),
        "bool with dead rows": dead,
        "additive": torch.randn(2, 1, queries, keys).to(dtype),
        "additive in float32": torch.randn(queries, keys),
        "additive with dead rows": additive.to(dtype),
        "gradient": torch.randn(2, 2, queries, keys).to(dtype).requires_grad_(),
        "gradient, shared by items": torch.randn(1, 2, queries, keys).to(dtype).requires_grad_(),
        "gradient, shared by heads": torch.randn(2, 1, queries, keys).to(dtype).requires_grad_(),
        "gradient, shared by all but keys": torch.randn(1, keys).to(dtype).requires_grad_(),
        "gradient, shared by rows": torch.randn(2, 2, 1, keys).to(dtype).requires_grad_(),
        "gradient, shared by keys": torch.randn(1, 2, queries, 1).to(dtype).requires_grad_(),
        "gradient, one number": torch.randn(1, 1, 1, 1).to(dtype).requires_grad_(),
    }


MASKS = [*masks(2, 3, torch.float32), "causal"]
WIDTHS = [(11, 11), (40, 40), (64, 23), (80, 80), (13, 160)]


def inputs_of(dtype: torch.dtype, kind: str, size: str, widths: tuple[int, int], key_heads: int | None) -> Inputs:
    """Inputs of one of the sizes, with one of the masks; widths are those of keys and of values."""
    return featured(dtype, kind, SIZES[size], widths, key_heads)


def featured(
    dtype: torch.dtype, kind: str, sizes: tuple[int, int], widths: tuple[int, int], key_heads: int | None
) -> Inputs:
    """The same with any number of queries and keys."""
    (queries, keys), (width, value_width) = sizes, widths
    mask = None if kind == "causal" else masks(queries, keys, dtype)[kind]
    given: dict[str, Any] = {"heads": 2, "queries": queries, "keys": keys, "width": width, "key_heads": key_heads}
    inputs = layer_inputs(dtype, **given, mask=mask, is_causal=kind == "causal")
    inputs.value = layer_like(2, inputs.key.shape[1], keys, value_width, dtype)
    return inputs


BLOCK_MASKS = ["packed texts", "window", "text between", "rows without keys", "nothing"]


def block_mask(name: str, queries: int, keys: int) -> Tensor:
    """A bool mask `(queries, keys)` that hides whole blocks, some of them from the first key on."""
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)
    packed = 5 * rows // queries == 5 * columns // keys
    return {
        "packed texts": packed,
        "window": (columns * queries - rows * keys).abs() < 61 * queries,
        "text between": ((columns < 11) | (2 * columns > keys)).expand(queries, keys).clone(),
        "rows without keys": packed & ((3 * rows < queries) | (2 * rows > queries)),
        "nothing": torch.zeros(queries, keys, dtype=torch.bool),
    }[name]
