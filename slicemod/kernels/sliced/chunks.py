"""The sliced kernel with the keys in chunks and a running softmax. For plans whose slices do not have all keys.

    maximum' = max(maximum, rowmax(scores)),   weights = exp(scores - maximum'),   shrink = exp(maximum - maximum')
    total' = shrink total + rowsum(weights),   output' = shrink output + dropout(weights) value

and in the end `output / total`, according to Milakov and Gimelshein, "Online normalizer calculation for softmax"
(arXiv 1805.02867). Nothing is kept for the backward pass. It goes over the chunks of a turn twice: first for the
maximum and total of its rows, then for the gradients.
"""

import torch
from torch import Tensor

from slicemod.kernels.outputs import empty_gradients, empty_heads
from slicemod.kernels.sliced.loop import (
    SlicedCall,
    TurnLoop,
    accumulator,
    add_mask_gradient,
    grouped,
    ranges,
    settle_sums,
)


class _RunningSoftmax:
    """The maximum and the total of each row over the chunks so far, `(items * heads, r, 1)` each."""

    def __init__(self, loop: TurnLoop, query: Tensor) -> None:
        statistics = loop.space.tile("row_statistics", 4, *query.shape[:2], 1)
        self.maximum, self._spare, self.total, self.sums = statistics.unbind()
        # Not -inf: for a row whose first chunk is all masked, -inf - (-inf) would be NaN.
        self.maximum.fill_(torch.finfo(loop.dtype).min)
        self.total.zero_()
        self._masked = loop.mask is not None

    def add(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of these scores, written over them, and the factor `shrink` for the sums of earlier chunks."""
        maximum = torch.amax(scores, -1, keepdim=True, out=self._spare)
        torch.maximum(maximum, self.maximum, out=maximum)
        weights = scores.sub_(maximum).exp_()
        shrink = self.maximum.sub_(maximum).exp_()
        self.maximum, self._spare = maximum, shrink
        self.total.mul_(shrink).add_(torch.sum(weights, -1, keepdim=True, out=self.sums))
        return weights, shrink

    def finish(self) -> None:
        """Sets the total of rows without a key to 1: their output is then zero, as in PyTorch's SDPA, and not 0 / 0."""
        if self._masked:
            self.total.masked_fill_(self.total == 0, 1)


def chunked_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: SlicedCall
) -> tuple[Tensor, Tensor]:
    """`math_forward` in chunks of `call.keys` keys. It keeps no weights.

    Returns:
        The output `(B, H, N, Dv)` and a tensor without elements.
    """
    loop = TurnLoop(query, key, value, mask, call)
    loop.allocate(loop.tiles.forward)
    generator = loop.generator()
    output = empty_heads(query, value.shape[3])
    chunks = ranges(0, key.shape[2], call.keys)
    for items, key_heads, turns in loop.key_turns():
        for turn in turns:
            part = loop.scaled_query(turn)
            written = loop.place("output", output, turn).zero_()  # (items * heads, r, Dv)
            running = _RunningSoftmax(loop, part)
            for keys in chunks:
                chunk = loop.load("key", key, items, key_heads, keys)
                values = loop.load("value", value, items, key_heads, keys)
                weights, shrink = running.add(loop.scores(part, chunk, turn, keys))
                if generator is not None:
                    weights.mul_(loop.draw(weights, generator))
                loop.add_weighted(written.mul_(shrink), weights, chunk, values)
            running.finish()
            written.div_(running.total)
            loop.settle(written, output, turn)
    return output, query.new_empty(0, dtype=loop.dtype)


def chunked_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    call: SlicedCall,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`math_backward` in chunks of `call.keys` keys.

    With `E = exp(S - maximum)` and `G' = G / total`, the sums over all keys are `p = sum(E (G' V^T) R) / total`, and
    `dV = (E R)^T G'`, `dS = E ((G' V^T) R - p)`.
    """
    need_query, need_key, need_value, need_mask = needs
    loop = TurnLoop(query, key, value, mask, call, mask_grad=need_mask)
    loop.allocate(loop.tiles.backward)
    first_draw, second_draw = loop.generator(), loop.generator()
    grad_query, grad_key, grad_value, mask_sum = empty_gradients(query, key, value, None, needs)
    if need_mask and mask is not None:
        mask_sum = mask.new_zeros(mask.shape, dtype=loop.dtype)
    chunks = ranges(0, key.shape[2], call.keys)
    for items, key_heads, turns in loop.key_turns():
        key_sum = accumulator(loop, "grad_key", grad_key[items, key_heads]) if need_key else None
        value_sum = accumulator(loop, "grad_value", grad_value[items, key_heads]) if need_value else None
        for turn in turns:
            part = loop.scaled_query(turn)
            grad_part = loop.copied("output", grad_output[turn])
            running = _RunningSoftmax(loop, part)
            product = loop.space.tile("row_product", *part.shape[:2], 1).zero_()
            for keys in chunks:
                chunk = loop.load("key", key, items, key_heads, keys)
                values = loop.load("value", value, items, key_heads, keys)
                weights, shrink = running.add(loop.scores(part, chunk, turn, keys))
                grad_weights = loop.space.tile("grad_scores", *weights.shape)
                torch.bmm(grouped(grad_part, chunk), values.transpose(1, 2), out=grouped(grad_weights, chunk))
                if first_draw is not None:
                    grad_weights.mul_(loop.draw(weights, first_draw))
                summed = torch.sum(grad_weights.mul_(weights), -1, keepdim=True, out=running.sums)
                product.mul_(shrink).add_(summed)
            running.finish()
            grad_part.div_(running.total)
            product.div_(running.total).div_(running.total)
            written = loop.place("grad_query", grad_query, turn).zero_() if need_query else None
            for keys in chunks:
                chunk = loop.load("key", key, items, key_heads, keys)
                values = loop.load("value", value, items, key_heads, keys)
                weights = loop.scores(part, chunk, turn, keys).sub_(running.maximum).exp_()
                grad_weights = loop.space.tile("grad_scores", *weights.shape)
                factor = None if second_draw is None else loop.draw(weights, second_draw)
                if value_sum is not None:
                    dropped = weights if factor is None else torch.mul(weights, factor, out=grad_weights)
                    columns = grouped(dropped, chunk).transpose(1, 2)
                    loop.add_product(value_sum[:, keys], columns, grouped(grad_part, chunk))
                if not (need_query or need_key or need_mask):
                    continue
                torch.bmm(grouped(grad_part, chunk), values.transpose(1, 2), out=grouped(grad_weights, chunk))
                if factor is not None:
                    grad_weights.mul_(factor)
                grad_scores = grad_weights.sub_(product).mul_(weights)
                if written is not None:
                    loop.add_product(grouped(written, chunk), grouped(grad_scores, chunk), chunk, alpha=call.scale)
                if key_sum is not None:
                    columns = grouped(grad_scores, chunk).transpose(1, 2)
                    loop.add_product(key_sum[:, keys], columns, grouped(part, chunk))
                if need_mask:
                    add_mask_gradient(loop, mask_sum, grad_scores, turn, keys)
            if written is not None:
                loop.settle(written, grad_query, turn)
        settle_sums(loop, items, key_heads, (grad_key, key_sum), (grad_value, value_sum))
    grad_mask = mask_sum.to(mask.dtype) if need_mask and mask is not None else mask_sum
    return grad_query, grad_key, grad_value, grad_mask
