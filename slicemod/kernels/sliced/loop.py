"""The sliced kernel: plain matrix products for some heads and rows at a time (a "turn"), in one workspace.

    scores = scale * query key^T + mask,   weights = softmax(scores),   output = dropout(weights) value

The backward pass computes the weights of a turn again from query and key, so nothing has to be kept after a turn. Every
product is written into a tile of the workspace, or directly into the output: the page faults of newly allocated buffers
would cost more time than the arithmetic.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from slicemod.call import attention_shape, attention_sizes
from slicemod.kernels.outputs import empty_gradients, empty_heads
from slicemod.kernels.sliced.products import PLAIN, Products
from slicemod.kernels.sliced.tiles import Tiles
from slicemod.kernels.sliced.workspace import Workspace
from slicemod.torch_internals import softmax_backward_into


@dataclass(frozen=True)
class SlicedCall:
    """The arguments of one call of the kernel besides its tensors, and its slices.

    Attributes:
        dropout_p: probability of dropping an attention weight.
        is_causal: query `i` sees keys `0..i`.
        scale: factor of the scores.
        upcast: compute half precision in float32.
        heads: batch x heads of a slice.
        rows: query rows of a slice.
        seed: the seed of the dropout's random numbers, the same for both passes; None without dropout.
        items: batch items that are computed together.
        keys: keys of a chunk; 0 for all at once.
        products: how the device multiplies.
    """

    dropout_p: float
    is_causal: bool
    scale: float
    upcast: bool
    heads: int
    rows: int
    seed: Tensor | None
    items: int = 1
    keys: int = 0
    products: Products = PLAIN


class Turn(NamedTuple):
    """The part of the call that one turn of the loop computes: batch items, heads and query rows."""

    items: slice
    heads: slice
    rows: slice


class TurnLoop:
    """What both passes have in common: the list of turns, the workspace, and the weights of a turn."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        call: SlicedCall,
        *,
        mask_grad: bool = False,
    ) -> None:
        self.query, self.mask, self.call = query, mask, call
        sizes = attention_sizes(
            query, key, value, mask, dropout_p=call.dropout_p, is_causal=call.is_causal, upcast=call.upcast
        )
        shape = attention_shape(sizes)
        if shape.mask is not None:
            shape = replace(shape, mask=replace(shape.mask, has_grad=mask_grad))
        self.tiles = Tiles.of_slice(shape, call.heads, call.rows, call.items, call.keys, call.products)
        self.products = call.products
        self.shape = self.tiles.shape
        self.dtype = torch.float32 if self.tiles.converts else query.dtype
        self.all_keys = slice(0, self.shape.keys)
        self.space: Workspace

    def allocate(self, sizes: dict[str, int]) -> None:
        """Make the workspace, with tiles of these numbers of elements."""
        self.space = Workspace(sizes, self.query, self.dtype)

    def generator(self) -> torch.Generator | None:
        """The generator of the dropout's random numbers: the same numbers in every pass. None without dropout."""
        seed = self.call.seed
        return None if seed is None else torch.Generator(self.query.device).manual_seed(int(seed))

    def key_turns(self) -> Iterator[tuple[slice, slice, list[Turn]]]:
        """Batch items, key heads, and the turns that use the keys and values of these."""
        group, at_once = self.shape.group, self.tiles.heads
        width = max(group, at_once)
        row_ranges = ranges(0, self.shape.queries, self.tiles.rows)
        for items in ranges(0, self.shape.batch, self.tiles.items):
            for shared in ranges(0, self.shape.heads, width):
                head_ranges = ranges(shared.start, shared.stop, at_once)
                turns = [Turn(items, heads, rows) for heads in head_ranges for rows in row_ranges]
                yield items, slice(shared.start // group, shared.stop // group), turns

    def load(self, name: str, matrices: Tensor, items: slice, key_heads: slice, keys: slice) -> Tensor:
        """Key or value of some heads, `(items * key heads, m, D)`, in the dtype of the scores."""
        source = matrices[items, key_heads, keys]
        return self.copied(name, source) if name in self.space else source.flatten(0, 1)

    def copied(self, name: str, source: Tensor) -> Tensor:
        """`(items, heads, ., .)` copied into a tile, `(items * heads, ., .)`."""
        return self.space.tile(name, *source.shape).copy_(source).flatten(0, 1)

    def place(self, name: str, target: Tensor, turn: Turn) -> Tensor:
        """Where to write a product of a turn, `(items * heads, r, .)`: `target`, or a tile that `settle` copies."""
        part = target[turn]
        return (self.space.tile(name, *part.shape) if self.tiles.stages else part).flatten(0, 1)

    def settle(self, written: Tensor, target: Tensor, turn: Turn) -> None:
        """Copy what was written into a tile to its place in `target`."""
        if self.tiles.stages:
            part = target[turn]
            part.copy_(written.view(part.shape))

    def scaled_query(self, turn: Turn) -> Tensor:
        """The scaled query of a turn, `(items * heads, r, D)`. If products are widened, as it is: `scores` scales."""
        part = self.query[turn]
        if self.widens:
            return self.space.narrow_tile("query", part.dtype, *part.shape).copy_(part).flatten(0, 1)
        return self.copied("query", part).mul_(self.call.scale)

    @property
    def widens(self) -> bool:
        """Half precision is multiplied as it is in this pass, with results in float32."""
        return "rounded" in self.space

    def add_weighted(self, target: Tensor, weights: Tensor, key: Tensor, value: Tensor) -> None:
        """Add the values of some keys, weighted, to `target`, `(items * heads, r, Dv)`. `key` tells the heads."""
        if self.widens and self.products.widened is not None:
            rounded = self.space.narrow_tile("rounded", value.dtype, *weights.shape).copy_(weights)
            product = self.space.tile("product", *target.shape)
            self.products.widened(rounded, value, product)
            target.add_(product)
        else:
            self.add_product(grouped(target, key), grouped(weights, key), value)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """`left` times `right`, written into `out`. As a sum of several products if the device sums no more terms."""
        terms, most = left.shape[2], self.products.most_terms
        if most is None or terms <= most:
            torch.bmm(left, right, out=out)
            return
        torch.bmm(left[:, :, :most], right[:, :most], out=out)
        self.add_product(out, left[:, :, most:], right[:, most:])

    def add_product(self, target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
        """Add `alpha` times `left` times `right` to `target`.

        If the device cannot add a product to a tensor that is not contiguous, it goes through a tile, always.
        """
        if self.products.adds_into_views:
            target.baddbmm_(left, right, alpha=alpha)
            return
        product = self.space.tile("product", *target.shape)
        for terms in ranges(0, left.shape[2], self.products.most_terms or left.shape[2]):
            torch.bmm(left[:, :, terms], right[:, terms], out=product)
            target.add_(product, alpha=alpha)

    def scores(self, query: Tensor, key: Tensor, turn: Turn, keys: slice) -> Tensor:
        """Scaled and masked scores of one turn with some keys, `(items * heads, r, m)`."""
        scores = self.space.tile("scores", query.shape[0], query.shape[1], key.shape[1])
        if self.widens and self.products.widened is not None:
            self.products.widened(query, key.transpose(1, 2), scores)
            scores.mul_(self.call.scale)
        else:
            torch.bmm(grouped(query, key), key.transpose(1, 2), out=grouped(scores, key))
        if self.call.is_causal:
            # Blocks that no query sees are computed too: SDPA multiplies their values by zero, so NaN in a value stays
            # NaN.
            future = self.space.tile("mask", *scores.shape[1:])
            scores.add_(future.fill_(-math.inf).triu_(turn.rows.start - keys.start + 1))
        if self.mask is not None:
            by_item = scores.view(turn.items.stop - turn.items.start, -1, *scores.shape[1:])
            by_item.add_(self._additive(_mask_part(self.mask, turn, keys)))
        return scores

    def weights(self, query: Tensor, key: Tensor, turn: Turn) -> Tensor:
        """Softmax of the scores of one turn, `(items * heads, r, M)`, before dropout."""
        scores = self.scores(query, key, turn, self.all_keys)
        if self.mask is None:
            return torch.softmax(scores, -1, out=scores)
        maximum = self.space.tile("row_maximum", *scores.shape[:2], 1)
        dead_rows = torch.amax(scores, -1, keepdim=True, out=maximum) == -math.inf
        # The weights of a row without a key are zero, as in PyTorch's SDPA. The softmax alone would give 0 / 0.
        return torch.softmax(scores, -1, out=scores).masked_fill_(dead_rows, 0)

    def _additive(self, part: Tensor) -> Tensor:
        if part.dtype == self.dtype:
            return part
        tile = self.space.tile("mask", *part.shape)
        # -inf is added and not written over the scores, so that NaN and inf in scores give what they give in SDPA.
        return tile.fill_(-math.inf).masked_fill_(part, 0) if part.dtype == torch.bool else tile.copy_(part)

    def softmax_backward(self, grad_weights: Tensor, weights: Tensor) -> Tensor:
        """`P (dP - sum(P dP))`, written over `dP`. On CUDA this also overwrites the tile of the output's gradient."""
        if not weights.is_cuda:
            return softmax_backward_into(grad_weights, weights, -1, self.dtype, grad_input=grad_weights)  # type: ignore[no-any-return]
        # On CUDA the operator above allocates a third tensor of scores.
        row_sums = self.space.tile("output", *weights.shape[:2], 1)
        grad_weights.mul_(weights)
        return grad_weights.addcmul_(weights, torch.sum(grad_weights, -1, keepdim=True, out=row_sums), value=-1)

    def draw(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """The dropout's factor for each weight: 0 or 1 / (1 - p)."""
        factor = self.space.tile("dropout", *weights.shape)
        keep = 1 - self.call.dropout_p
        return factor.bernoulli_(keep, generator=generator).div_(keep) if keep > 0 else factor.zero_()


def ranges(start: int, stop: int, width: int) -> list[slice]:
    """The range from `start` to `stop` in parts of `width`. The last part may be smaller."""
    return [slice(first, min(first + width, stop)) for first in range(start, stop, width)]


def grouped(per_query_head: Tensor, key: Tensor) -> Tensor:
    """`(heads, r, .)` of a tile as `(key heads, heads per key head * r, .)`, for one product per key head."""
    heads, rows, width = per_query_head.shape
    if heads == key.shape[0]:
        return per_query_head
    return per_query_head.view(key.shape[0], heads // key.shape[0] * rows, width)


def _mask_part(mask: Tensor, turn: Turn, keys: slice) -> Tensor:
    """The part of a 4-D mask for a turn and some keys. Dimensions along which the mask is broadcast stay 1."""
    return mask[tuple(part if size > 1 else slice(None) for part, size in zip((*turn, keys), mask.shape, strict=True))]


def math_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: SlicedCall, *, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """Attention of query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)`; `Hk` divides `H`.

    Returns:
        The output `(B, H, N, Dv)`. With `keep_weights` also the weights before dropout, `(B, H, N, M)`; otherwise an
        empty tensor.
    """
    loop = TurnLoop(query, key, value, mask, call)
    loop.allocate(loop.tiles.forward)
    generator = loop.generator()
    output = empty_heads(query, value.shape[3])
    kept = query.new_empty(kept_shape(query, key) if keep_weights else (0,), dtype=loop.dtype)
    for items, key_heads, turns in loop.key_turns():
        keys = loop.load("key", key, items, key_heads, loop.all_keys)
        values = loop.load("value", value, items, key_heads, loop.all_keys)
        for turn in turns:
            weights = loop.weights(loop.scaled_query(turn), keys, turn)
            if keep_weights:
                part = kept[turn]
                part.copy_(weights.view(part.shape))
            if generator is not None:
                weights.mul_(loop.draw(weights, generator))
            written = loop.place("output", output, turn)  # (items * heads, r, Dv)
            loop.multiply(grouped(weights, keys), values, grouped(written, keys))
            loop.settle(written, output, turn)
    return output, kept


def kept_shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """The shape of the kept weights, `(B, H, N, M)`."""
    return query.shape[0], query.shape[1], query.shape[2], key.shape[2]


def math_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    call: SlicedCall,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask. For those that `needs` leaves out, tensors without elements.

    With `P` the weights, `R` the dropout factors and `G` the gradient of the output, per row:
    `dV = (P R)^T G`, `dP = (G V^T) R`, `dS = P (dP - sum(P dP))`, `dQ = scale dS K`, `dK = dS^T (scale Q)`.
    Gradients of key and value are summed over the slices in the dtype of the scores.
    """
    need_query, need_key, need_value, need_mask = needs
    loop = TurnLoop(query, key, value, mask, call, mask_grad=need_mask)
    loop.allocate(loop.tiles.backward)
    generator = loop.generator()
    grad_query, grad_key, grad_value, mask_sum = empty_gradients(query, key, value, None, needs)
    if need_mask and mask is not None:
        mask_sum = mask.new_zeros(mask.shape, dtype=loop.dtype)
    for items, key_heads, turns in loop.key_turns():
        keys = loop.load("key", key, items, key_heads, loop.all_keys)
        values = loop.load("value", value, items, key_heads, loop.all_keys)
        key_sum = accumulator(loop, "grad_key", grad_key[items, key_heads]) if need_key else None
        value_sum = accumulator(loop, "grad_value", grad_value[items, key_heads]) if need_value else None
        for turn in turns:
            part = loop.scaled_query(turn)
            grad_part = loop.copied("output", grad_output[turn])
            weights = loop.copied("scores", kept[turn]) if kept.numel() else loop.weights(part, keys, turn)
            grad_weights = loop.space.tile("grad_scores", *weights.shape)
            factor = None if generator is None else loop.draw(weights, generator)
            if value_sum is not None:
                dropped = weights if factor is None else torch.mul(weights, factor, out=grad_weights)
                loop.add_product(value_sum, grouped(dropped, keys).transpose(1, 2), grouped(grad_part, keys))
            if not (need_query or need_key or need_mask):
                continue
            torch.bmm(grouped(grad_part, keys), values.transpose(1, 2), out=grouped(grad_weights, keys))
            if factor is not None:
                grad_weights.mul_(factor)
            grad_scores = loop.softmax_backward(grad_weights, weights)
            if need_query:
                written = loop.place("grad_query", grad_query, turn)  # (items * heads, r, D)
                loop.multiply(grouped(grad_scores, keys), keys, grouped(written, keys))
                written.mul_(call.scale)
                loop.settle(written, grad_query, turn)
            if key_sum is not None:
                loop.add_product(key_sum, grouped(grad_scores, keys).transpose(1, 2), grouped(part, keys))
            if need_mask:
                add_mask_gradient(loop, mask_sum, grad_scores, turn, loop.all_keys)
        settle_sums(loop, items, key_heads, (grad_key, key_sum), (grad_value, value_sum))
    grad_mask = mask_sum.to(mask.dtype) if need_mask and mask is not None else mask_sum
    return grad_query, grad_key, grad_value, grad_mask


def accumulator(loop: TurnLoop, name: str, place: Tensor) -> Tensor:
    """Zeros to sum the gradient of some key heads in, `(items * key heads, M, .)`: in `place`, or in a tile."""
    return (loop.space.tile(name, *place.shape) if loop.tiles.accumulates else place).zero_().flatten(0, 1)


def settle_sums(loop: TurnLoop, items: slice, key_heads: slice, *sums: tuple[Tensor, Tensor | None]) -> None:
    """Copy the gradients that were summed in tiles to their places."""
    for target, summed in sums:
        if loop.tiles.accumulates and summed is not None:
            place = target[items, key_heads]
            place.copy_(summed.view(place.shape))


def add_mask_gradient(loop: TurnLoop, mask_sum: Tensor, grad_scores: Tensor, turn: Turn, keys: slice) -> None:
    """Add the gradient of some scores to the mask's, summed over the dimensions along which the mask is broadcast."""
    part = _mask_part(mask_sum, turn, keys)
    gradient = grad_scores.view(turn.items.stop - turn.items.start, -1, *grad_scores.shape[1:])
    broadcast = [axis for axis in range(4) if part.shape[axis] != gradient.shape[axis]]
    if broadcast:
        summed = loop.space.tile("mask", *part.shape)
        gradient = torch.sum(gradient, broadcast, keepdim=True, out=summed)
    part.add_(gradient)
