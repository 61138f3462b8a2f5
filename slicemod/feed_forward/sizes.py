"""The sizes of a feed-forward's parts, and how much its activation holds at once."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from slicemod.feed_forward.plan import FeedForwardShape
from slicemod.on_cpu.widened import WidenedLinear, largest_scratch

# By the name of the activation's class: how many tensors as wide as its result exist at once in inference, and while
# gradients are computed. Measured by `peak_memory`; tests/feed_forward/test_plan.py compares.
_HELD = {"GEGLU": (4, 6), "SwiGLU": (4, 6), "ApproximateGELU": (3, 5)}
_HELD_BY_OTHERS = 2, 3


class FeedForwardSizes(NamedTuple):
    """What a feed-forward is made of, in plain values.

    Attributes:
        channels: of the input.
        inner: channels between the two projections.
        out: channels of the output.
        held: how many tensors of `inner` channels exist at once in inference.
        held_in_training: the same while gradients are computed.
        weight: elements of the larger weight.
        scratch: bytes that a product itself takes in inference.
    """

    channels: int
    inner: int
    out: int
    held: float
    held_in_training: float
    weight: int
    scratch: int = 0

    def shape(
        self,
        tokens: int,
        itemsize: int,
        *,
        training: bool = False,
        trains_weights: bool = True,
        checkpoint: bool = True,
    ) -> FeedForwardShape:
        """The call with so many tokens of `itemsize` bytes an element.

        Args:
            tokens: all tokens of all items.
            itemsize: bytes of an element.
            training: gradients are needed.
            trains_weights: also those of the weights. A chunk's gradient exists beside the sum of all chunks.
            checkpoint: the backward pass recomputes each chunk.
        """
        held = self.held_in_training if training else self.held
        copies = 3 if itemsize == 2 else 2  # half precision is summed in float32
        fixed = copies * self.weight * itemsize if training and trains_weights else 0
        fixed += 0 if training else self.scratch
        return FeedForwardShape(
            tokens, self.channels, self.inner, self.out, itemsize, held, fixed, training, checkpoint
        )


def sizes_of(net: Any) -> FeedForwardSizes:
    """The sizes of the parts of a feed-forward: the projection with the activation, a dropout, the projection back.

    Projections that adapters such as LoRA wrap hold more at once: the product, the update, and their sum.
    """
    activation, last = net[0], net[2]
    first = first_projection(activation)
    held, in_training = _HELD.get(type(activation).__name__, _HELD_BY_OTHERS)
    wide = first.out_features / last.in_features
    if not is_product(first):
        held, in_training = max(held, 3 * wide), max(in_training, 4 * wide)
    weight = max(first.in_features * first.out_features, last.in_features * last.out_features)
    scratch = largest_scratch(first, last)
    return FeedForwardSizes(first.in_features, last.in_features, last.out_features, held, in_training, weight, scratch)


def is_product(projection: nn.Module) -> bool:
    """The projection is a product with its weight, and nothing that wraps one, such as LoRA."""
    return type(projection) in (nn.Linear, WidenedLinear)


def first_projection(activation: nn.Module) -> Any:
    """The projection in the first part of a feed-forward: of a GEGLU and its like, or of projection and activation."""
    return activation[0] if isinstance(activation, nn.Sequential) else activation.proj
