"""What a plan is: how one attention call is computed, in plain ints; and the error where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from slicemod.call import AttentionShape
from slicemod.memory.sizes import exact_size_text

Axis = Literal["query", "heads"]

# Metal and Level Zero refuse a single buffer above about 4 GiB, whatever is free.
BUFFER_CAPS = {"mps": 4 * 2**30, "xpu": 4 * 2**30}


class NotEnoughMemoryError(RuntimeError):
    """No plan fits the memory: says what is needed, what is there and what to change."""


@dataclass(frozen=True)
class SlicePlan:
    """How one attention call is computed.

    Attributes:
        axis: what is sliced, "query" rows or batch x "heads".
        steps: how many slices.
        slice_size: query rows, or batch x heads, of a slice; the last slice may be smaller.
        peak_bytes: most bytes that the attention holds beyond its inputs, its output and its input gradients.
        kernel: the name of the kernel that runs it, out of `slicemod.kernels.KERNELS`.
        policy: the policy that decided, or "pinned" where the number of steps was given.
        heads: batch x heads of a slice, or fewer where the device allows no buffer that large.
        rows: query rows of a slice.
        checkpoint: the backward pass recomputes each slice; otherwise the weights of all slices are kept for it.
        upcast: tiles are float32 where the inputs have half precision.
        items: batch items that are computed together; more than one where they are small.
        keys: keys of a slice, which carries a running softmax from one chunk of keys to the next; 0 for all keys.
    """

    axis: Axis
    steps: int
    slice_size: int
    peak_bytes: int
    kernel: str
    policy: str
    heads: int
    rows: int
    checkpoint: bool = True
    upcast: bool = False
    items: int = 1
    keys: int = 0

    def __str__(self) -> str:
        size = f"{self.peak_bytes:,} bytes ({self.policy})"
        if self.steps == 1 and not self.keys:
            return f"{self.kernel}, {size}"
        slices = f"{self.steps} x {self.slice_size} {'rows' if self.axis == 'query' else 'heads'}"
        return f"{self.kernel}, {slices}{f' by {self.keys} keys' if self.keys else ''}, {size}"


def largest_square(shape: AttentionShape, fits: Callable[[AttentionShape], bool]) -> int:
    """Side in pixels, in steps of 64, of the largest square image whose attention fits; see `AttentionShape.at_side`.

    0 where no image fits, 16384 where any up to there does.
    """
    sides = range(64, 2**14 + 1, 64)
    return next((side - 64 for side in sides if not fits(shape.at_side(side))), sides[-1])


def not_enough(who: str, need: int, have: int, shape: AttentionShape, side: int, advice: str) -> NotEnoughMemoryError:
    """The error of `who` needs more bytes than it has; `side` is what `largest_square` found."""
    would_fit = f"at most about {side}x{side} would fit" if side else "no image is small enough"
    return NotEnoughMemoryError(
        f"{who}: needs {exact_size_text(need)} and has {exact_size_text(have)}, for {shape}. {advice} "
        f"or lower the resolution: {would_fit}."
    )
