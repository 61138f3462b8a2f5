"""Bare attention calls: plain ones of any number of tokens, and those with masks, dropout or an odd shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slicemod.bench.peers import Peer
from slicemod.bench.work import Exact, Work, some_rows
from slicemod.call import AttentionShape
from slicemod.reference import reference_attention

_FRAMES = 16  # of a video; its temporal attention has as many items as the image has tokens


@dataclass(frozen=True)
class CallWork(Work):
    """Attention without projections, called with mask, dropout, causal and grouped heads.

    Attributes:
        series: what kind of call.
        size: edge of the image in pixels, or tokens, in `unit`.
        shape: its sizes; causal, dropout and grouped heads, but not its mask.
        unit: of `size`.
        mask: `"padding"`, a bool for each key; `"packed"`, a bool for each query and key, of four sequences in one;
            `"heads"`, numbers for each head, query and key that are added to the scores; `"learned"`, the same with a
            gradient.
        dropout: the probability that a weight is dropped; none is where the call is checked.
    """

    series: str
    size: int
    shape: AttentionShape
    unit: str = "px"
    mask: Literal["padding", "packed", "heads", "learned"] | None = None
    dropout: float = 0.0

    @property
    def training_only(self) -> bool:  # type: ignore[override]
        """Nobody learns or drops anything in inference."""
        return self.mask == "learned" or self.dropout > 0

    def has_gradient(self, position: int) -> bool:
        """The first three inputs have one, and a learned mask."""
        return position < 3 or self.mask == "learned"

    def build(self) -> nn.Module:
        """Nothing: a call has no weights to share."""
        return nn.Module()

    def inputs(self) -> tuple[Any, ...]:
        """Query `(B, H, N, D)`, key and value `(B, H or fewer, M, D)`, mask or None, and the options."""
        shape = self.shape
        query = torch.randn(shape.batch, shape.heads, shape.queries, shape.head_dim)
        key, value = torch.randn(2, shape.batch, shape.key_heads or shape.heads, shape.keys, shape.head_dim).unbind()
        return (query, key, value, self._mask(), *self._options(self.dropout))

    def computed_by(self, peer: Peer, base: nn.Module) -> nn.Module | None:
        """The attention of `peer` alone."""
        return peer.alone()

    def exact(self, base: nn.Module, inputs: tuple[Any, ...]) -> list[Exact]:
        """Of this call without dropout."""
        rows = some_rows(self.shape.queries)
        query, key, value = (tensor.double() for tensor in inputs[:3])
        mask = inputs[3]
        if self.shape.causal:
            mask = (rows[:, None] >= torch.arange(self.shape.keys)).to(query.device)
        elif mask is not None and mask.shape[-2] > 1:
            mask = mask[:, :, rows]
        wanted = reference_attention(query[:, :, rows], key, value, mask, enable_gqa=self.shape.group > 1)
        return [Exact("", (*inputs[:4], *self._options(0.0)), rows, wanted)]

    def attention(self) -> list[tuple[AttentionShape, int]]:
        """This one call."""
        return [(self.shape, 1)]

    def _mask(self) -> Tensor | None:
        shape = self.shape
        if self.mask is None:
            return None
        if self.mask == "padding":  # the last quarter, of every item
            return (torch.arange(shape.keys) < shape.keys - shape.keys // 4).expand(shape.batch, 1, 1, -1).contiguous()
        if self.mask == "packed":
            sequence_of_query, sequence_of_key = (4 * torch.arange(n) // n for n in (shape.queries, shape.keys))
            return (sequence_of_query[:, None] == sequence_of_key)[None, None]
        return torch.randn(1, shape.heads, shape.queries, shape.keys)

    def _options(self, dropout: float) -> tuple[Any, ...]:
        return dropout, self.shape.causal, self.shape.group > 1


def plain_call(tokens: int, heads: int, head_dim: int) -> CallWork:
    """Attention of `tokens` to themselves."""
    series = f"attention, {heads} heads of {head_dim}"
    return CallWork(series, tokens, AttentionShape(1, heads, tokens, tokens, head_dim, 4), unit="tokens")


def calls_of(sizes: Sequence[int]) -> list[CallWork]:
    """Every call that is not plain, at some edges of the image: a token for 8 by 8 pixels, or for 16 by 16."""
    found = [call for size in sizes for call in _calls(size, (size // 8) ** 2, (size // 16) ** 2)]
    order = list(dict.fromkeys(call.series for call in found))
    return sorted(found, key=lambda call: order.index(call.series))


def _calls(size: int, fine: int, coarse: int) -> list[CallWork]:
    """Those of one image, with `fine` or `coarse` tokens."""
    own = AttentionShape(1, 8, coarse, coarse, 64, 4)
    return [
        CallWork("padding mask on 77 keys, 8x40", size, AttentionShape(2, 8, fine, 77, 40, 4), mask="padding"),
        CallWork("padding mask on 256 keys, 8x64", size, AttentionShape(2, 8, coarse, 256, 64, 4), mask="padding"),
        CallWork("mask of four packed sequences, 8x64", size, own, mask="packed"),
        CallWork("mask for each head, 8x64", size, own, mask="heads"),
        CallWork("mask with a gradient, 8x64", size, own, mask="learned"),
        CallWork("causal, 8x64", size, replace(own, causal=True)),
        CallWork("8 heads on 2 (GQA), 8x64", size, replace(own, key_heads=2)),
        CallWork("dropout of a tenth, 8x64", size, replace(own, dropout=True), dropout=0.1),
        CallWork("one head of a VAE, 1x512", size, AttentionShape(1, 1, fine, fine, 512, 4)),
        CallWork(f"{_FRAMES} frames of a video, 8x40", size, AttentionShape(fine, 8, _FRAMES, _FRAMES, 40, 4)),
    ]
