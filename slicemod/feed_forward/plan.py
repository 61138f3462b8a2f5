"""How many tokens of a feed-forward are computed at a time, and what that takes: plain ints, made from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from slicemod.memory.sizes import exact_size_text
from slicemod.plan import NotEnoughMemoryError
from slicemod.rounding import ceil_div

# With fewer tokens than this, or fewer multiplications, a product does not run at full speed. Measured on a CPU of two
# cores with AVX-512, in float32 and bfloat16, where larger chunks were no faster. For other devices an estimate.
_LEAST_TOKENS = 512
_LEAST_PRODUCTS_ON_CPU, _LEAST_PRODUCTS = 2**30, 2**33


@dataclass(frozen=True)
class FeedForwardShape:
    """One call of a feed-forward.

    Attributes:
        tokens: all tokens of all items.
        channels: of the input.
        inner: channels between the two projections.
        out: channels of the output.
        itemsize: bytes of an element.
        held: how many tensors of `inner` channels a chunk holds at once.
        fixed: bytes beyond these that do not depend on the size of a chunk: the gradient of a weight, or a copy of an
            input with gaps.
        training: gradients are needed.
        checkpoint: the backward pass recomputes each chunk. Otherwise what all tokens hold is kept for it.
    """

    tokens: int
    channels: int
    inner: int
    out: int
    itemsize: int
    held: float
    fixed: int = 0
    training: bool = False
    checkpoint: bool = True

    def peak_bytes(self, tokens: int) -> int:
        """Bytes beyond input, output and gradients if so many tokens are computed at a time."""
        activations = self.held * self.inner
        beside = activations + self.channels + self.out
        width = beside if self.training else max(activations, self.inner + self.out)
        return int(tokens * width * self.itemsize) + self.fixed

    def __str__(self) -> str:
        return f"{self.tokens} tokens of {self.channels} channels, {self.inner} inside"


@dataclass(frozen=True)
class FeedForwardPlan:
    """How one call of a feed-forward is computed.

    Attributes:
        tokens: how many are computed at a time. The last chunk may have fewer.
        steps: the number of chunks.
        peak_bytes: the most bytes that it holds beyond its input, its output and, in training, the gradients of its
            input and weights.
        checkpoint: the backward pass recomputes each chunk.
    """

    tokens: int
    steps: int
    peak_bytes: int
    checkpoint: bool = False

    def __str__(self) -> str:
        return f"{self.steps} x {self.tokens} tokens, {self.peak_bytes:,} bytes"


def plan_feed_forward(shape: FeedForwardShape, free_bytes: int, device_type: str = "cpu") -> FeedForwardPlan:
    """The fewest chunks that fit `free_bytes` and run at full speed, of about the same size.

    Raises:
        NotEnoughMemoryError: not even one token fits; without `checkpoint`, not all tokens do.

    >>> plan_feed_forward(FeedForwardShape(4096, 320, 1280, 320, 2, held=4), 2**24)
    FeedForwardPlan(tokens=1366, steps=3, peak_bytes=13987840, checkpoint=False)
    """
    keeps_all = shape.training and not shape.checkpoint
    least = shape.tokens if keeps_all else 1
    if (need := shape.peak_bytes(least)) > free_bytes:
        raise NotEnoughMemoryError(
            f"feed-forward: needs {exact_size_text(need)} and has {exact_size_text(free_bytes)}, for {shape}. "
            f"{'Set checkpoint=True, raise' if keeps_all else 'Raise'} the budget or lower the resolution."
        )
    tokens = shape.tokens
    if not keeps_all:
        per_token = shape.peak_bytes(1) - shape.fixed
        tokens = min(tokens, _full_speed(shape, device_type), max(1, (free_bytes - shape.fixed) // per_token))
    steps = ceil_div(shape.tokens, tokens)
    tokens = ceil_div(shape.tokens, steps)
    checkpoint = shape.training and shape.checkpoint
    return FeedForwardPlan(tokens, ceil_div(shape.tokens, tokens), shape.peak_bytes(tokens), checkpoint)


def _full_speed(shape: FeedForwardShape, device_type: str) -> int:
    """Tokens with which the products run at full speed."""
    products = _LEAST_PRODUCTS_ON_CPU if device_type == "cpu" else _LEAST_PRODUCTS
    return max(_LEAST_TOKENS, ceil_div(products, shape.channels * shape.inner))
