"""The sliced kernel for processors that multiply bfloat16 matrices natively: products in bfloat16, as exact as SDPA's.

A bfloat16 product rounds its result, and scores rounded as they are would cost accuracy: an error of a 512th of a
score of 10 is one of 2% in its weight. So the product itself subtracts a shift close to the maximum of the row, by a
column of its own, before anything is rounded:

    scores = scale * (query key^T - shift),   weights = 2^(log2(e) scores) / sum

Weights that matter then belong to scores near 0, which are rounded finely. The shift, a bfloat16 number, need not be
the maximum: softmax does not change with it. It is the maximum over a sample of the keys; the rows whose true maximum
turns out to be far above are computed once more. Sums of weights come from the product with value, by columns of ones.

The backward pass subtracts inside a product too: `dP - sum(P dP)`, whose terms nearly cancel.

Scores are transposed, keys by rows: the products are faster that way round where a head has few channels.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from slicemod.bf16_shape import EXTRA_COLUMNS, SAMPLED_KEYS, SUM_PARTS, Bf16Tiles
from slicemod.math_kernel import Call, attention_shape, attention_sizes, empty_gradients, empty_heads
from slicemod.workspace import Workspace

_LOG2_E = math.log2(math.e)

# Weights before their division that a row may have, as the bits of a bfloat16: 2^4.25. A row with greater ones has its
# maximum so far above its shift that the rounding of its scores is felt.
_MOST_WEIGHT_BITS = int(torch.tensor(2.0**4.25, dtype=torch.bfloat16).view(torch.int16))

# Where more rows than an eighth have to be computed again, finding their maximum first costs less.
_MANY_ROWS = 8


class _Kernel:
    """The workspace of one call, and what forward and backward compute alike, for some heads of a batch item."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: Call, *, backward: bool) -> None:
        sizes = attention_sizes(query, key, value, None, dropout_p=0.0, is_causal=False, upcast=False)
        self.shape = shape = attention_shape(sizes)
        self.tiles = tiles = Bf16Tiles(shape, call.heads if shape.group == 1 else 1, min(call.rows, shape.queries))
        self.space = Workspace(tiles.backward if backward else tiles.forward, query, query.dtype)
        self.scale = call.scale
        keys = self.key_tile(tiles.heads)
        keys[..., shape.head_dim] = -1
        keys[..., shape.head_dim + 1 :] = 0
        self.space.tile("query", -1, tiles.width)[:, shape.head_dim + 1 :] = 0

    def key_tile(self, heads: int) -> Tensor:
        """`(h, M, width)`: keys, and the column of -1 that subtracts a shift."""
        return self.space.tile("key", heads, self.shape.keys, self.tiles.width)

    def query_tile(self, heads: int, rows: int) -> Tensor:
        """`(h, r, width)`: queries, and the column of their shifts."""
        return self.space.tile("query", heads, rows, self.tiles.width)

    def turns(self) -> list[slice]:
        """The rows of each turn."""
        queries, step = self.shape.queries, self.tiles.rows
        return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]

    def head_turns(self) -> Iterator[tuple[int, slice, slice]]:
        """Batch item, query heads and the key heads that they look at."""
        shape, step = self.shape, self.tiles.heads
        for item in range(shape.batch):
            for first in range(0, shape.heads, step):
                heads = slice(first, min(first + step, shape.heads))
                yield item, heads, heads if shape.group == 1 else slice(first // shape.group, first // shape.group + 1)

    def product(self, keys: Tensor, query: Tensor, alpha: float) -> Tensor:
        """`alpha (query key^T - shift)`, transposed: `(h, M, r)`."""
        scores = self.space.tile("scores", keys.shape[0], keys.shape[1], query.shape[1])
        return torch.baddbmm(scores, keys, query.transpose(1, 2), beta=0, alpha=alpha, out=scores)

    def weights(self, keys: Tensor, query: Tensor) -> Tensor:
        """`(h, M, r)`, not yet divided by their sums."""
        return self.product(keys, query, self.scale * _LOG2_E).exp2_()


def bf16_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)`, all bfloat16; `Hk` divides `H`.

    Returns:
        The output `(B, H, N, Dv)` and, with `keep`, of each row `(B, H, N)` the shift in bfloat16 and the inverse of
        its weights' sum in float32, else empty tensors.
    """
    output = empty_heads(query, value.shape[3])
    shifts = query.new_empty(query.shape[:3] if keep else 0)
    inverse_sums = query.new_empty(query.shape[:3] if keep else 0, dtype=torch.float32)
    kernel = _Kernel(query, key, value, call, backward=False)
    forward = _Forward(kernel)
    for item, heads, key_heads in kernel.head_turns():
        sums, shift = forward.attend(
            query[item, heads], key[item, key_heads], value[item, key_heads], output[item, heads]
        )
        if keep:
            shifts[item, heads] = shift
            torch.reciprocal(sums, out=inverse_sums[item, heads])
    return output, shifts, inverse_sums


class _Forward:
    def __init__(self, kernel: _Kernel) -> None:
        self.kernel = kernel
        self.find_maxima = False
        shape, tiles = kernel.shape, kernel.tiles
        values = kernel.space.tile("value", tiles.heads, tiles.value_width, shape.keys)
        # A row of ones for each part of the keys: some rounded sums are together more exact than one.
        values[:, shape.values :] = 0
        for row, keys in enumerate(values.tensor_split(EXTRA_COLUMNS, 2)):
            keys[:, shape.values + row] = 1

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Write the output `(h, N, Dv)` of some heads; the sums of their weights in float32, and shifts, `(h, N)`."""
        kernel, width = self.kernel, self.kernel.tiles.value_width
        heads, queries, head_dim = query.shape
        value_dim = value.shape[2]
        self.keys, self.query = kernel.key_tile(heads), kernel.query_tile(heads, queries)
        self.values = kernel.space.tile("value", heads, width, value.shape[1])
        self.keys[..., :head_dim] = key
        self.query[..., :head_dim] = query
        self.values[:, :value_dim] = value.transpose(1, 2)
        self.shift = self.query[..., head_dim]
        if self.find_maxima:
            for turn in kernel.turns():
                self.shift[:, turn] = self.maxima(self.keys, self.query[:, turn])
        else:
            self.sample_maxima(query, key)
        merged = kernel.space.tile("output", heads, width, queries)
        bits = [self.turn(self.keys, self.query[:, turn], self.values, merged[..., turn]) for turn in kernel.turns()]
        if not self.find_maxima:
            again = torch.cat(bits, 1) > _MOST_WEIGHT_BITS
            for head in again.any(1).nonzero().flatten().tolist():
                for rows in torch.split(again[head].nonzero().squeeze(1), kernel.tiles.rows):
                    self.turn_again(slice(head, head + 1), rows, merged)
            self.find_maxima = int(again.sum()) * _MANY_ROWS > again.numel()
        sums = merged[:, value_dim:].sum(1, dtype=torch.float32)
        output.copy_(merged[:, :value_dim].float().div_(sums.unsqueeze(1)).transpose(1, 2))
        return sums, self.shift

    def sample_maxima(self, query: Tensor, key: Tensor) -> None:
        """Set each row's shift to its maximum over some of the keys."""
        # An odd step does not stay in one column of an image whose width is a power of two.
        sample = key[:, :: key.shape[1] // SAMPLED_KEYS | 1]  # (h, s, D)
        at_once = max(1, self.kernel.tiles.forward["scores"] // (self.kernel.tiles.heads * sample.shape[1]))
        for part, shift in zip(torch.split(query, at_once, 1), torch.split(self.shift, at_once, 1), strict=True):
            scores = self.kernel.space.tile("scores", query.shape[0], sample.shape[1], part.shape[1])
            torch.amax(torch.bmm(sample, part.transpose(1, 2), out=scores), 1, out=shift)

    def maxima(self, keys: Tensor, query: Tensor) -> Tensor:
        query[..., self.kernel.shape.head_dim] = 0
        return self.kernel.product(keys, query, 1.0).amax(1)

    def turn(self, keys: Tensor, query: Tensor, values: Tensor, merged: Tensor) -> Tensor:
        """Write `(h, Dv + sums, r)`; the bits of the greatest weight of each row `(h, r)`."""
        weights = self.kernel.weights(keys, query)
        torch.bmm(values, weights, out=merged)
        # Weights are positive, and positive floats are ordered as their bits are.
        return weights.view(torch.int16).amax(1)

    def turn_again(self, head: slice, rows: Tensor, merged: Tensor) -> None:
        """Compute the rows of these indices with their true maxima."""
        query = self.query[head, rows]  # (1, r, width)
        maxima = self.maxima(self.keys[head], query)
        query[..., self.kernel.shape.head_dim] = maxima
        self.shift[head, rows] = maxima
        part = query.new_empty(1, merged.shape[1], rows.numel())
        self.turn(self.keys[head], query, self.values[head], part)
        merged[head, :, rows] = part


def bf16_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    shifts: Tensor,
    inverse_sums: Tensor,
    call: Call,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, those that `needs` names; empty tensors for the others.

    With `E` the weights before the division by their sums `s` and `G = grad_output / s`, per row:
    `dV = E^T G`, `dS = E (G V^T - sum(G O))`, `dQ = scale dS K`, `dK = scale dS^T Q`.
    """
    need_query, need_key, need_value = needs
    kernel = _Kernel(query, key, value, call, backward=True)
    shape, tiles, space = kernel.shape, kernel.tiles, kernel.space
    head_dim, value_dim = shape.head_dim, shape.values
    value_tile = space.tile("value", tiles.heads, shape.keys, tiles.value_width)
    value_tile[..., value_dim : value_dim + 2] = -1
    value_tile[..., value_dim + 2 :] = 0
    space.tile("grad_output", -1, tiles.value_width)[:, value_dim + 2 :] = 0
    sum_space = Workspace(tiles.sums, query, torch.float32)
    grad_query, grad_key, grad_value, _ = empty_gradients(query, key, value, None, (*needs, False))
    for item, heads, key_heads in kernel.head_turns():
        count = heads.stop - heads.start
        keys, values = kernel.key_tile(count), space.tile("value", count, shape.keys, tiles.value_width)
        key_sum, value_sum = sum_space.tile("grad_key", *keys.shape), sum_space.tile("grad_value", *values.shape)
        if heads.start % shape.group == 0:
            keys[..., :head_dim] = key[item, key_heads]
            values[..., :value_dim] = value[item, key_heads]
            key_sum.zero_()
            value_sum.zero_()
        for rows in kernel.turns():
            turn = item, heads, rows
            queries = kernel.query_tile(count, rows.stop - rows.start)
            queries[..., :head_dim] = query[turn]
            queries[..., head_dim] = shifts[turn]
            grad = space.tile("grad_output", *queries.shape[:2], tiles.value_width)
            torch.mul(grad_output[turn], inverse_sums[turn].unsqueeze(2), out=grad[..., :value_dim])
            _split(grad[..., :value_dim].float().mul_(output[turn]).sum(2), grad[..., value_dim:])
            weights = kernel.weights(keys, queries)
            if need_value:
                _add(value_sum, torch.bmm(weights, grad, out=space.tile("grad_scores", *values.shape)))
            if not (need_query or need_key):
                continue
            grad_scores = space.tile("grad_scores", *weights.shape)
            torch.bmm(values, grad.transpose(1, 2), out=grad_scores).mul_(weights)
            if need_key:
                _add(key_sum, torch.bmm(grad_scores, queries, out=space.tile("scores", *keys.shape)))
            if need_query:
                part = space.tile("grad_query", count, tiles.width, queries.shape[1])
                torch.bmm(keys.transpose(1, 2), grad_scores, out=part)
                torch.mul(part[:, :head_dim].transpose(1, 2), call.scale, out=grad_query[turn])
        if heads.stop % shape.group == 0:
            if need_key:
                grad_key[item, key_heads] = key_sum.mul_(call.scale)[..., :head_dim]
            if need_value:
                grad_value[item, key_heads] = value_sum[..., :value_dim]
    return grad_query, grad_key, grad_value


def _split(exact: Tensor, columns: Tensor) -> None:
    """A float32 number for each row as the sum of two bfloat16 ones, in the first two columns."""
    columns[..., 0] = exact
    columns[..., 1] = exact - columns[..., 0]


def _add(total: Tensor, part: Tensor) -> None:
    """Add bfloat16 to float32, some keys at a time: PyTorch converts what it adds in a buffer of its own."""
    for some, more in zip(total.chunk(SUM_PARTS, 1), part.chunk(SUM_PARTS, 1), strict=True):
        some.add_(more)
