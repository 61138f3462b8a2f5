"""What the whole takes at any resolution: each part with what stays loaded meanwhile, which part limits, what fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from slicemod.memory.sizes import size_text
from slicemod.planning.memory_timeline import StepPeak
from slicemod.planning.picture_parts import Part
from slicemod.planning.step_peaks import Way


class PartPeak(NamedTuple):
    """What one part takes at one resolution.

    Attributes:
        name: of the part.
        weights: bytes of its weights, and in training of the optimizer's state, that are held at its peak.
        stays_loaded: bytes of the other parts meanwhile.
        peaks: bytes that it holds beyond these two, for each way to compute that is possible.
        fits: whether all of this together fits the memory, for each of these ways.
    """

    name: str
    weights: int
    stays_loaded: int
    peaks: dict[Way, int]
    fits: dict[Way, bool]

    def total(self, way: Way) -> int | None:
        """All bytes that are held at the peak; None if the way is not possible."""
        return None if way not in self.peaks else self.weights + self.stays_loaded + self.peaks[way]


class Largest(NamedTuple):
    """The largest square image that the whole goes through.

    Attributes:
        way: how it is computed.
        pixels: its edge; 0 if none fits.
        limit: the part that does not fit for a larger image; None if the model takes no larger ones.
    """

    way: Way
    pixels: int
    limit: str | None

    @property
    def size(self) -> str:
        """As a user writes it."""
        return f"{self.pixels} x {self.pixels}" if self.pixels else "none"

    @property
    def why(self) -> str:
        """What a larger image would not fit."""
        return "the model takes no larger ones" if self.limit is None else f"{self.limit} is the limit"


@dataclass(frozen=True)
class WholePlan:
    """What the whole takes at one resolution.

    Attributes:
        pixels: edge of the square image.
        parts: in the order in which they run.
    """

    pixels: int
    parts: tuple[PartPeak, ...]

    def peak(self, way: Way) -> int | None:
        """The most bytes that are held at once; None if the way is not possible."""
        totals = [part.total(way) for part in self.parts]
        return None if None in totals else max(total for total in totals if total is not None)

    def limit(self, way: Way) -> str:
        """The part that takes the most, or that is not possible."""
        return max(self.parts, key=lambda part: float("inf") if (t := part.total(way)) is None else t).name

    def fits(self, way: Way) -> bool:
        """Every part fits."""
        return all(part.fits.get(way, False) for part in self.parts)


class PicturePlanner:
    """Plans the whole on a device with a given amount of memory.

    Args:
        parts: in the order in which they run.
        together: all parts are loaded all the time; otherwise each is alone.
        memory: bytes of the device.
        resolution_step: edges of images are multiples of this.
        most_pixels: the largest edge that the model takes.
        ways: to compute it.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        together: bool,
        memory: int,
        resolution_step: int,
        most_pixels: int,
        ways: Sequence[Way],
    ) -> None:
        self.parts, self.together, self.memory, self.ways = parts, together, memory, tuple(ways)
        self.resolution_step, self.most_pixels = resolution_step, most_pixels

    @property
    def trains(self) -> bool:
        """The last part is a step of training."""
        return self.parts[-1].trains

    def stays_loaded(self, part: Part) -> int:
        """Bytes of the other parts while one runs."""
        return sum(other.waiting for other in self.parts if other is not part) if self.together else 0

    def plan(self, pixels: int) -> WholePlan:
        """The whole for square images with edges of `pixels`, a multiple of `resolution_step`."""
        return WholePlan(pixels, tuple(self._part(part, pixels) for part in self.parts))

    def fits(self, way: Way, pixels: int) -> bool:
        """Whether every part fits."""
        return all(self._fits(part, way, pixels) for part in self.parts)

    def largest(self, way: Way) -> Largest:
        """The largest square image that fits, and the part that a larger one does not fit."""
        least, most = 0, self.most_pixels // self.resolution_step
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self.fits(way, middle * self.resolution_step) else (least, middle - 1)
        above = (least + 1) * self.resolution_step
        limit = None if above > self.most_pixels else self._limit(way, above)
        return Largest(way, least * self.resolution_step, limit)

    def within(self, memory: int) -> PicturePlanner:
        """The same with another amount of memory."""
        return PicturePlanner(
            self.parts,
            together=self.together,
            memory=memory,
            resolution_step=self.resolution_step,
            most_pixels=self.most_pixels,
            ways=self.ways,
        )

    def _limit(self, way: Way, pixels: int) -> str:
        """What of an image that does not fit is the largest."""
        weights = sum(part.waiting for part in self.parts)
        if self.together and weights > self.memory:
            return f"the weights, {size_text(weights)} together"
        failing = [part for part in self.parts if not self._fits(part, way, pixels)]
        return max(failing, key=lambda part: part.whole_peak(way, pixels) + self.stays_loaded(part)).name

    def _fits(self, part: Part, way: Way, pixels: int) -> bool:
        return part.fits(way, pixels, self.memory - self.stays_loaded(part))

    def _part(self, part: Part, pixels: int) -> PartPeak:
        stays = self.stays_loaded(part)
        left = self.memory - stays
        peaks = part.peaks(pixels, left)
        held = {way: _beyond_weights(peak) for way, peak in peaks.items() if way in self.ways}
        weights = max((peak.weights + peak.optimizer for peak in peaks.values()), default=part.waiting)
        return PartPeak(part.name, weights, stays, held, {way: part.fits(way, pixels, left) for way in held})


def _beyond_weights(peak: StepPeak) -> int:
    return peak.total - peak.weights - peak.optimizer
