"""What a plan is: how one attention call is computed, in plain ints. And the errors if there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from slicemod.call import AttentionShape
from slicemod.memory.sizes import exact_size_text
from slicemod.user_error import FieldError

Axis = Literal["query", "heads"]

# Largest single buffer in bytes. Metal and Level Zero are reported to refuse buffers above about 4 GiB, whatever is
# free; this was not tried here.
BUFFER_CAPS = {"mps": 4 * 2**30, "xpu": 4 * 2**30}


class NotEnoughMemoryError(RuntimeError):
    """No plan fits the memory. The message says what is needed, what there is, and what to change."""


class ObstacleError(FieldError, ValueError):
    """The kernel that is asked for cannot run the call. The message says why, and what to take instead."""


@dataclass(frozen=True)
class SlicePlan:
    """How one attention call is computed.

    Attributes:
        axis: what is sliced: "query" rows, or batch x "heads".
        steps: the number of slices.
        slice_size: query rows, or batch x heads, of a slice. A slice has the heads of whole batch items, or some of one
            item. The last slice, of all rows or of an item's heads, may be smaller.
        peak_bytes: the most bytes that the attention holds beyond its inputs, its output and its input gradients.
        kernel: the name of the kernel that runs the call, one of `slicemod.kernels.KERNELS`.
        policy: the policy that decided; "pinned" if the user gave the number of steps.
        heads: batch x heads that are computed at a time. This is fewer than a slice has if the slice would need a
            larger buffer than the device allows.
        rows: query rows that are computed at a time.
        checkpoint: the backward pass recomputes each slice. Otherwise the weights of all slices are kept for it.
        upcast: tiles are float32, though the inputs have half precision.
        items: batch items that are computed together; more than one only if they are small.
        keys: keys that are computed at a time, with a running softmax over these chunks; 0 for all keys at once.
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
    """Side in pixels, a multiple of 64, of the largest square image whose attention fits; see `AttentionShape.at_side`.

    0 if no image fits; 16384, the largest size that is tried, if all fit.
    """
    sides = range(64, 2**14 + 1, 64)
    return next((side - 64 for side in sides if not fits(shape.at_side(side))), sides[-1])


def not_enough(who: str, need: int, have: int, shape: AttentionShape, side: int, advice: str) -> NotEnoughMemoryError:
    """The error that says: `who` needs more bytes than there are. `side` is the answer of `largest_square`."""
    would_fit = f"at most about {side}x{side} would fit" if side else "no image is small enough"
    return NotEnoughMemoryError(
        f"{who}: needs {exact_size_text(need)} and has {exact_size_text(have)}, for {shape}. {advice} "
        f"or lower the resolution: {would_fit}."
    )
