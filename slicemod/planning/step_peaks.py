"""The peak of a UNet's step at any resolution, for each way to compute its attention, and where each stops fitting.

A step is traced at two resolutions. Everything but attention grows in proportion to the pixels, so that the rows of
the two timelines give those of every other resolution; attention is counted by its own formulas.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from slicemod.plan import NotEnoughMemoryError, SlicePlan, fused_peak
from slicemod.planning.attention_stand_in import FUSING_DEVICES, AttentionCall
from slicemod.planning.memory_timeline import AttentionCost, StepPeak, Timeline
from slicemod.planning.unet_step import StepKind, trace_step
from slicemod.planning.unets import UnetSource
from slicemod.shapes import AttentionShape
from slicemod.slice_config import SliceConfig
from slicemod.user_error import UserError

Way = Literal["full attention", "fused", "slicemod"]
TRACED_STEPS = (8, 16)  # the resolutions that are traced, in steps of the UNet's own
HIGHEST_RESOLUTION = 2**14
_GROWING_SIZES = ("batch", "queries", "keys")  # of attention calls, with the resolution


class LayerPlan(NamedTuple):
    """The plan of all attention layers of one shape, or the error that says why there is none."""

    shape: AttentionShape
    layers: int
    plan: SlicePlan | NotEnoughMemoryError


@dataclass(frozen=True)
class ResolutionPlan:
    """What one step needs at one resolution.

    Attributes:
        pixels: edge of the square image.
        budget: bytes that the rest of the step leaves for attention: `SliceConfig.budget` of these plans.
        layers: every shape of attention, largest scores first.
        peaks: of the whole step, for each way to compute attention that is possible.
    """

    pixels: int
    budget: int
    layers: tuple[LayerPlan, ...]
    peaks: dict[Way, StepPeak]


class StepPlanner:
    """Plans one kind of step of one UNet on a device with so much memory.

    Args:
        source: the UNet.
        kind: what the step is.
        memory: bytes for the whole step, weights included.
        slicing: policy and kernel of slicemod's attention; its budget is what the rest of the step leaves.

    Raises:
        UserError: `source` describes no UNet, or one without attention.
    """

    def __init__(self, source: UnetSource, kind: StepKind, memory: int, slicing: SliceConfig) -> None:
        self.kind, self.memory, self.slicing = kind, memory, slicing
        self.resolution_step = source.resolution_step
        self._full_upcasts = bool(source.config.get("upcast_attention"))
        self._traced = [trace_step(source, kind, steps * self.resolution_step) for steps in TRACED_STEPS]
        if not self._traced[0].calls:
            raise UserError("model: it computes no attention, so that there is nothing to plan. Name another one.")
        self._plans: dict[int, ResolutionPlan] = {}

    def plan(self, pixels: int) -> ResolutionPlan:
        """The step on square images with edges of `pixels`, a multiple of `resolution_step`."""
        if pixels not in self._plans:
            self._plans[pixels] = self._plan(*self.at(pixels), pixels)
        return self._plans[pixels]

    def largest(self, way: Way) -> int:
        """Edge in pixels of the largest square image whose step fits, up to `HIGHEST_RESOLUTION`; 0 where none does."""
        least, most = 0, HIGHEST_RESOLUTION // self.resolution_step
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self._fits(way, middle * self.resolution_step) else (least, middle - 1)
        return least * self.resolution_step

    def at(self, pixels: int) -> tuple[Timeline, list[AttentionCall]]:
        """The timeline and the attention calls at a resolution, from those that were traced."""
        first, second = self._traced
        low, high = (steps * self.resolution_step for steps in TRACED_STEPS)
        part, whole = pixels**2 - low**2, high**2 - low**2

        def between(name: str, a: AttentionShape, b: AttentionShape) -> int:
            size: int = getattr(a, name) + (getattr(b, name) - getattr(a, name)) * part // whole
            return size

        calls = [
            replace(a, shape=replace(a.shape, **{name: between(name, a.shape, b.shape) for name in _GROWING_SIZES}))
            for a, b in zip(first.calls, second.calls, strict=True)
        ]
        return first.timeline.between(second.timeline, part, whole), calls

    def _plan(self, timeline: Timeline, calls: list[AttentionCall], pixels: int) -> ResolutionPlan:
        others = [self._kept_by_fused(call) if call.fused_obstacle is None else 0 for call in calls]
        budget = self.memory - timeline.held_at_attention([AttentionCost(kept, 0) for kept in others])
        answers = {call: self._answer(call, budget) for call in set(calls)}
        ours = [plan for call in calls if isinstance(plan := answers[call], SlicePlan)]
        costs: dict[Way, list[AttentionCost]] = {"full attention": [self._full_cost(call) for call in calls]}
        if self.kind.device_type in FUSING_DEVICES:
            costs["fused"] = [
                self._cost(call, fused_peak(call.shape, self.kind.device_type, training=self.kind.training), fused=True)
                for call in calls
            ]
        if len(ours) == len(calls):
            costs["slicemod"] = [
                self._cost(call, plan.peak_bytes, fused=plan.kernel == "fused")
                for call, plan in zip(calls, ours, strict=True)
            ]
        counted = Counter(calls[: self._traced[0].layers])
        largest_first = sorted(counted.items(), key=lambda item: -item[0].shape.scores_bytes)
        return ResolutionPlan(
            pixels,
            budget,
            tuple(LayerPlan(call.shape, layers, answers[call]) for call, layers in largest_first),
            {way: timeline.peak(cost) for way, cost in costs.items()},
        )

    def _fits(self, way: Way, pixels: int) -> bool:
        peak = self.plan(pixels).peaks.get(way)
        return peak is not None and peak.total <= self.memory

    def _answer(self, call: AttentionCall, budget: int) -> SlicePlan | NotEnoughMemoryError:
        if budget < 1:
            return NotEnoughMemoryError(
                f"memory: expected more than {self.memory - budget:,} bytes, which the step holds beside its attention; "
                f"got {self.memory:,}. Lower the resolution or the batch."
            )
        try:
            return replace(self.slicing, budget=budget).plan(
                call.shape,
                torch.device(self.kind.device_type),
                training=self.kind.training,
                fused_obstacle=call.fused_obstacle,
            )
        except NotEnoughMemoryError as error:
            return error

    def _cost(self, call: AttentionCall, peak: int, *, fused: bool) -> AttentionCost:
        kept = self._kept_by_fused(call) if fused else 0
        return AttentionCost(kept, peak - kept)

    def _kept_by_fused(self, call: AttentionCall) -> int:
        """The log-sum-exp of every row, in float32."""
        return call.shape.batch_heads * call.shape.queries * 4 if self.kind.training else 0

    def _full_cost(self, call: AttentionCall) -> AttentionCost:
        """diffusers' AttnProcessor: two tensors of scores at a time, besides the weights that backward needs."""
        shape = call.shape
        pairs = shape.batch_heads * shape.queries * shape.keys
        upcasts = self._full_upcasts and shape.itemsize < 4
        scores = pairs * (4 if upcasts else shape.itemsize)
        weights = scores + (pairs * shape.itemsize if upcasts else 0)  # the softmax, and what enters the product
        return AttentionCost(weights if self.kind.training else 0, 2 * scores)
