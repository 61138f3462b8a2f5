"""A layer in parts: in inference, some rows of it at a time go through query, attention and output projection.

Then all queries, keys and values never exist at once. Half of the heads are computed at a time, for one item of the
batch at a time. For two items of 4096 tokens the peak of a layer is 1.75 token tensors of `(B, N, C)` instead of 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.layers.heads import merge_heads, split_heads
from slicemod.layers.projection import is_plain, is_plain_linear
from slicemod.rounding import ceil_div

# With fewer tokens the layer takes little memory, and its parts would be too small for products at full speed.
LEAST_TOKENS = 4096
# As many parts at any size, so that the peak grows in proportion to the tokens. The native kernel arranges all keys
# anew for each part. At 4096 tokens of 320 channels on an AMD EPYC (Zen 4), two parts took 0.97 to 1.02 of the time of
# the whole layer, four 1.03 to 1.18, and half of the heads with all rows 0.76 of the memory instead of 0.64.
ROW_PARTS = 2

# Rows of heads that a GPU needs at once so that all of its processors have work: two blocks of 128 rows for each of the
# 132 processors of an H200. An estimate, which was not measured on a GPU.
_BUSY_ROWS = 2 * 132 * 128


class Projections(NamedTuple):
    """The four projections of a layer."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear


class StreamPlan(NamedTuple):
    """How many of a layer's `all_heads`, and how many rows of one batch item, are computed at a time."""

    all_heads: int
    heads: int
    rows: int


def plan_stream(all_heads: int, tokens: int, keys: int, device_type: str) -> StreamPlan | None:
    """The parts of a layer with `tokens` queries and `keys` keys for each item; None if it is computed as a whole.

    So is a layer with few keys, such as those of a text. It takes less than self-attention of the same tokens anyway.

    >>> plan_stream(8, tokens=4096, keys=4096, device_type="cpu")
    StreamPlan(all_heads=8, heads=4, rows=2048)
    """
    heads, rows = ceil_div(all_heads, 2), ceil_div(tokens, ROW_PARTS)
    busy = device_type == "cpu" or heads * rows >= _BUSY_ROWS
    many = tokens >= LEAST_TOKENS and 2 * keys >= tokens
    return StreamPlan(all_heads, heads, rows) if many and busy else None


def projections_of(
    query: nn.Module, key: nn.Module, value: nn.Module, output: Any, x: Tensor, context: Tensor
) -> Projections | None:
    """The projections of a layer of `x` and `context`, if each is only a product with its weight; None otherwise.

    Not so are, for example, projections with adapters, hooks or quantised weights, and all projections under autocast,
    while a gradient is needed, and while something, such as a compiler, watches the operators. `output` may be a
    sequence of the projection and perhaps a dropout, if nothing is dropped now.
    """
    is_called_in_order = type(output) is nn.ModuleList or (type(output) is nn.Sequential and is_plain(output, x))
    if is_called_in_order and len(output) in (1, 2):
        output, *rest = output
        for dropout in rest:
            if type(dropout) is not nn.Dropout or not is_plain(dropout, x) or (dropout.training and dropout.p > 0):
                return None
    if (
        is_plain_linear(query, x)
        and is_plain_linear(key, context)
        and is_plain_linear(value, context)
        and is_plain_linear(output, x)
    ):
        return Projections(query, key, value, output)
    return None


def stream(
    plan: StreamPlan,
    parts: Projections,
    x: Tensor,
    context: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The layer's output `(B, N, C)`, computed in the parts of the plan.

    Args:
        plan: of `plan_stream`.
        parts: of `projections_of`.
        x: `(B, N, C)`.
        context: `(B, M, C')`.
        attend: from query `(1, h, n, D)`, key and value `(1, h, M, D)` to the output of these heads, `(1, h, n, D)`.
    """
    batch, tokens, _ = x.shape
    inner, width = parts.query.out_features, parts.output.out_features
    head_dim = inner // plan.all_heads
    output = x.new_empty(batch, tokens, width)
    for item in range(batch):
        own = slice(item, item + 1)
        # What the heads give takes the place of the layer's output, if it has the same size.
        attended = output[item] if inner == width else x.new_empty(tokens, inner)  # (N, H D)
        for some in _ranges(plan.all_heads, plan.heads):
            count = some.stop - some.start
            columns = slice(some.start * head_dim, some.stop * head_dim)
            key = split_heads(_project(parts.key, context[own], columns), count)  # (1, h, M, D)
            value = split_heads(_project(parts.value, context[own], columns), count)
            for rows in _ranges(tokens, plan.rows):
                query = split_heads(_project(parts.query, x[own, rows], columns), count)  # (1, h, n, D)
                part = attend(query, key, value)
                del query  # each tensor goes before the next one comes
                if count == plan.all_heads:
                    _project_into(output[item, rows], parts.output, merge_heads(part)[0])
                else:
                    attended[rows, columns] = merge_heads(part)[0]
                del part
            del key, value
        if plan.heads < plan.all_heads:
            for rows in _ranges(tokens, plan.rows):
                if inner == width:
                    output[item, rows] = F.linear(attended[rows], parts.output.weight, parts.output.bias)
                else:
                    _project_into(output[item, rows], parts.output, attended[rows])
        del attended
    return output


def _ranges(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _project(linear: nn.Linear, tokens: Tensor, columns: slice) -> Tensor:
    """Some columns of `linear(tokens)`."""
    bias = linear._parameters["bias"]
    return F.linear(tokens, linear.weight[columns], None if bias is None else bias[columns])


def _project_into(output: Tensor, linear: nn.Linear, tokens: Tensor) -> None:
    """Writes `linear(tokens)`, `(n, C)`, into the contiguous `output`."""
    bias = linear._parameters["bias"]
    if bias is None:
        torch.mm(tokens, linear.weight.t(), out=output)
    else:
        torch.addmm(bias, tokens, linear.weight.t(), out=output)
