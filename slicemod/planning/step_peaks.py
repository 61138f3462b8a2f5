"""The peak of a step at any resolution, for each way to compute its attention, and the largest that fits.

A step is traced at two resolutions. Everything except attention grows in proportion to the pixels, so the rows of the
two timelines give the rows of every other resolution. Attention is counted by its own formulas. On a CPU one thing is
not proportional: PyTorch convolves tiny images in another way, which takes less than what is predicted for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from slicemod.call import AttentionShape, CallSpec
from slicemod.choose import choose
from slicemod.config import SliceConfig
from slicemod.kernels import kernel_named
from slicemod.kernels.fused.running import BACKENDS
from slicemod.plan import BUFFER_CAPS, NotEnoughMemoryError, SlicePlan
from slicemod.planning.attention_costs import full_attention_cost, fused_attention_cost, planned_attention_cost
from slicemod.planning.memory_timeline import AttentionCost, StepPeak, Timeline
from slicemod.planning.step_source import StepSource
from slicemod.planning.unet_step import StepKind, TracedStep, trace_step
from slicemod.rounding import ceil_div
from slicemod.user_error import UserError

Way = Literal["full attention", "fused", "slicemod"]
WAYS: tuple[Way, ...] = ("full attention", "fused", "slicemod")
TRACED_STEPS = (8, 16)  # the resolutions that are traced, in steps of the UNet's own
_LEAST_TRACED = 256  # pixels; PyTorch convolves smaller images in other ways on a CPU


class LayerPlan(NamedTuple):
    """The plan of all attention layers with one shape, or the error that says why there is none.

    The plan is None if slicemod does not compute the attention.
    """

    shape: AttentionShape
    layers: int
    plan: SlicePlan | NotEnoughMemoryError | None


@dataclass(frozen=True)
class ResolutionPlan:
    """What one step needs at one resolution.

    Attributes:
        pixels: edge of the square image.
        budget: bytes that the rest of the step leaves for attention. It is the budget of these plans.
        layers: every shape of attention, those with the largest scores first.
        peaks: the peak of the whole step, for each possible way to compute attention.
    """

    pixels: int
    budget: int
    layers: tuple[LayerPlan, ...]
    peaks: dict[Way, StepPeak]


class StepPlanner:
    """Plans one kind of step of one UNet on a device with a given amount of memory.

    Args:
        source: the UNet.
        kind: what the step is.
        memory: bytes for the whole step, weights included.
        slicing: policy and kernel of slicemod's attention. Its budget is replaced by what the rest of the step leaves.
        progress: is told what is being done if that takes seconds.

    Raises:
        UserError: `source` describes no model.
    """

    def __init__(
        self,
        source: StepSource,
        kind: StepKind,
        memory: int,
        slicing: SliceConfig,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.kind, self.memory, self.slicing = kind, memory, slicing
        self.resolution_step = source.resolution_step
        self.most_pixels = source.most_pixels
        self._full_upcasts = source.full_upcasts
        # A model may compute less at the size that it was trained at, for which it has a table of positions at hand.
        least, most = TRACED_STEPS
        low = max(least, ceil_div(_LEAST_TRACED, self.resolution_step))
        edges = (steps * self.resolution_step for steps in (low, low * most // least))
        self._pixels = [edge + self.resolution_step * (edge == source.own_pixels) for edge in edges]
        self._traced = []
        for pixels in self._pixels:
            progress(f"tracing the step at {pixels} x {pixels} pixels")
            self._traced.append(trace_step(source, kind, pixels))
        if not self._traced[0].timeline.has_the_rows_of(self._traced[1].timeline):
            raise UserError(
                "model: expected one that runs the same operators at every resolution; got one that does not. Name "
                "another one."
            )
        self._steps: dict[int, TracedStep] = {}
        self._plans: dict[int, ResolutionPlan] = {}

    @property
    def weights(self) -> int:
        """Bytes that are loaded all the time."""
        return self._traced[0].timeline.weights

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return self._traced[0].timeline.optimizer

    def within(self, memory: int) -> StepPlanner:
        """The same step with another amount of memory."""
        other = copy(self)
        other.memory, other._plans = memory, {}
        return other

    def inputs(self, pixels: int) -> int:
        """Bytes of the tensors that a step is given, which its peaks leave out."""
        return self._step(pixels).inputs

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways to compute attention that can be planned.

        Not on every device is it known whether PyTorch fuses, and nobody runs transformers with full attention.
        """
        possible = {"fused": self.kind.device_type in BACKENDS, "full attention": self._full_upcasts is not None}
        return tuple(way for way in WAYS if possible.get(way, True))

    def plan(self, pixels: int) -> ResolutionPlan:
        """The step on square images with edges of `pixels`, a multiple of `resolution_step`."""
        if pixels not in self._plans:
            self._plans[pixels] = self._plan(pixels)
        return self._plans[pixels]

    def largest(self, way: Way) -> int:
        """Edge in pixels of the largest square image whose step fits, up to `most_pixels`; 0 if none fits."""
        least, most = 0, self.most_pixels // self.resolution_step
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self.fits(way, middle * self.resolution_step) else (least, middle - 1)
        return least * self.resolution_step

    def fits(self, way: Way, pixels: int) -> bool:
        """Whether the step fits the memory, and no tensor of full attention is larger than the device allows."""
        plan = self.plan(pixels)
        sizes = [layer.shape.scores_bytes for layer in plan.layers] if way == "full attention" else []
        scores = max(sizes, default=0)
        if scores > BUFFER_CAPS.get(self.kind.device_type, scores):
            return False
        return way in plan.peaks and plan.peaks[way].total <= self.memory

    def at(self, pixels: int) -> tuple[Timeline, list[CallSpec]]:
        """The timeline and the attention calls at a resolution, computed from the two traced steps."""
        step = self._step(pixels)
        return step.timeline, list(step.calls)

    def _step(self, pixels: int) -> TracedStep:
        if pixels not in self._steps:
            first, second = self._traced
            low, high = self._pixels
            self._steps[pixels] = first.between(second, pixels**2 - low**2, high**2 - low**2)
        return self._steps[pixels]

    def _plan(self, pixels: int) -> ResolutionPlan:
        timeline, calls = self.at(pixels)
        training, fused = self.kind.training, kernel_named("fused")
        kept = [fused.kept_bytes(call.shape, training=training) if not fused.obstacle(call) else 0 for call in calls]
        budget = self.memory - timeline.held_at_attention([AttentionCost(size, 0) for size in kept])
        answers = {call: self._answer(call, budget) for call in set(calls)}
        plans = [plan for call in calls if isinstance(plan := answers[call], SlicePlan)]
        costs: dict[Way, list[AttentionCost]] = {}
        if self._full_upcasts is not None:
            costs["full attention"] = [full_attention_cost(call, upcast=self._full_upcasts) for call in calls]
        if "fused" in self.ways:
            costs["fused"] = [fused_attention_cost(call) for call in calls]
        if len(plans) == len(calls):
            costs["slicemod"] = [planned_attention_cost(call, plan) for call, plan in zip(calls, plans, strict=True)]
        counted = Counter(calls[: self._traced[0].layers])
        largest_first = sorted(counted.items(), key=lambda item: -item[0].shape.scores_bytes)
        return ResolutionPlan(
            pixels,
            budget,
            tuple(LayerPlan(call.shape, layers, answers[call]) for call, layers in largest_first),
            {way: timeline.peak(cost) for way, cost in costs.items()},
        )

    def _answer(self, call: CallSpec, budget: int) -> SlicePlan | NotEnoughMemoryError:
        if budget < 1:
            return NotEnoughMemoryError(
                f"memory: expected more than the {self.memory - budget:,} bytes that the step holds beside its "
                f"attention; got {self.memory:,}. Lower the resolution or the batch."
            )
        try:
            return choose(call, replace(self.slicing, budget=budget), budget)
        except NotEnoughMemoryError as error:
            return error
