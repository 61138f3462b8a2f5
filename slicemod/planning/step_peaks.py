"""The peak of a step at any resolution, for each way to compute its attention, and the largest that fits.

A step is traced at two resolutions. Everything except attention grows in proportion to the pixels, so the rows of the
two timelines give the rows of every other resolution. Attention is counted by its own formulas. On a CPU one thing is
not proportional: PyTorch convolves tiny images in another way, which takes less than what is predicted for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from slicemod.call import AttentionShape, CallSpec
from slicemod.choose import choose
from slicemod.config import SliceConfig
from slicemod.feed_forward.plan import FeedForwardShape, plan_feed_forward
from slicemod.kernels.fused.running import BACKENDS
from slicemod.memory.budget import AMPLE
from slicemod.plan import BUFFER_CAPS, NotEnoughMemoryError, ObstacleError, SlicePlan
from slicemod.planning.attention_costs import full_attention_cost, fused_attention_cost, planned_attention_cost
from slicemod.planning.autoencoders import AutoencoderSource
from slicemod.planning.layer_calls import LayerCall
from slicemod.planning.memory_timeline import AttentionCost, StepPeak, Timeline
from slicemod.planning.step_source import StepSource
from slicemod.planning.strip_peaks import strip_layers, strips_within
from slicemod.planning.unet_step import StepKind, TracedStep, trace_step
from slicemod.rounding import ceil_div
from slicemod.user_error import UserError
from slicemod.vae.plan import Convolving, LayerSizes

Way = Literal["full attention", "fused", "slicemod"]
WAYS: tuple[Way, ...] = ("full attention", "fused", "slicemod")
TRACED_STEPS = (8, 16)  # the resolutions that are traced, in steps of the UNet's own
_LEAST_TRACED = 256  # pixels; PyTorch convolves smaller images in other ways on a CPU
Refusal: TypeAlias = NotEnoughMemoryError | ObstacleError


class LayerPlan(NamedTuple):
    """The plan of all attention layers with one shape, or the error that says why there is none.

    The plan is None if slicemod does not compute the attention.
    """

    shape: AttentionShape
    layers: int
    plan: SlicePlan | Refusal | None


@dataclass(frozen=True)
class ResolutionPlan:
    """What one step needs at one resolution.

    Attributes:
        pixels: edge of the square image.
        budget: bytes that the rest of the step leaves for attention. It is the budget of these plans.
        layers: every shape of attention, those with the largest scores first.
        peaks: the peak of the whole step, for each possible way to compute attention.
        obstacle: why the kernel that is asked for cannot run one of the attention calls; None if it can.
    """

    pixels: int
    budget: int
    layers: tuple[LayerPlan, ...]
    peaks: dict[Way, StepPeak]
    obstacle: ObstacleError | None


class StepPlanner:
    """Plans one kind of step of one UNet on a device with a given amount of memory.

    Args:
        source: the UNet.
        kind: what the step is.
        memory: bytes for the whole step, weights included.
        slicing: policy and kernel of slicemod's attention. Its budget is replaced by what the rest of the step leaves.
        progress: is told what is being done if that takes seconds.
        swapped: slicemod's way is `swap_attention(feed_forward=True)` or `swap_vae`, which compute layers in parts in
            inference. Otherwise it is the attention alone, and what `slicing` says of the layers in training.

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
        *,
        swapped: bool = False,
    ) -> None:
        self.kind, self.memory, self.slicing = kind, memory, slicing
        self.resolution_step = source.resolution_step
        self.most_pixels = source.most_pixels
        self._full_upcasts = source.full_upcasts
        # A model may compute less at the size that it was trained at, for which it has a table of positions at hand.
        least, most = TRACED_STEPS
        below_the_largest = self.most_pixels // self.resolution_step - 1  # there it may take its whole table
        low = max(least, min(ceil_div(_LEAST_TRACED, self.resolution_step), below_the_largest * least // most))
        edges = (steps * self.resolution_step for steps in (low, low * most // least))
        self._pixels = [edge + self.resolution_step * (edge == source.own_pixels) for edge in edges]
        self._traced = []
        for pixels in self._pixels:
            progress(f"tracing the step at {pixels} x {pixels} pixels")
            self._traced.append(trace_step(source, kind, pixels))
        self._swapped: list[TracedStep] = []
        self._strips: tuple[LayerSizes, ...] = ()
        self._input_pixels = 1
        if swapped and isinstance(source, AutoencoderSource):
            self._strips = strip_layers(source, kind.dtype)
            self._input_pixels = 1 if source.encodes else source.latent_pixels
        else:
            swaps = _swaps(kind, slicing, swapped=swapped)
            self._swapped = [trace_step(source, swaps, edge) for edge in self._pixels] if swaps != kind else []
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
        """The step on square images with edges of `pixels`, a multiple of `resolution_step`.

        Raises:
            ObstacleError: the kernel that is asked for cannot run one of its attention calls.
        """
        plan = self._plan(pixels)
        if plan.obstacle is not None:
            raise plan.obstacle
        return plan

    def peak(self, way: Way, pixels: int) -> StepPeak | None:
        """The peak of one way to compute such images; None if it is not possible."""
        return self._plan(pixels).peaks.get(way)

    def largest(self, way: Way) -> int:
        """Edge in pixels of the largest square image whose step fits, up to `most_pixels`; 0 if none fits."""
        least, most = 0, self.most_pixels // self.resolution_step
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self.fits(way, middle * self.resolution_step) else (least, middle - 1)
        return least * self.resolution_step

    def fits(self, way: Way, pixels: int) -> bool:
        """Whether the step fits the memory, and no tensor of full attention is larger than the device allows."""
        layers, peak = self._plan(pixels).layers, self.peak(way, pixels)
        scores = max((layer.shape.scores_bytes for layer in layers), default=0) if way == "full attention" else 0
        if scores > BUFFER_CAPS.get(self.kind.device_type, scores):
            return False
        return peak is not None and peak.total <= self.memory

    def at(self, pixels: int) -> tuple[Timeline, list[CallSpec]]:
        """The timeline and the attention calls at a resolution, computed from the two traced steps."""
        step = self._step(pixels)
        return step.timeline, list(step.calls)

    def _step(self, pixels: int) -> TracedStep:
        if pixels not in self._steps:
            self._steps[pixels] = self._between(self._traced, pixels)
        return self._steps[pixels]

    def _between(self, traced: Sequence[TracedStep], pixels: int) -> TracedStep:
        first, second = traced
        low, high = self._pixels
        return first.between(second, pixels**2 - low**2, high**2 - low**2)

    def _plan(self, pixels: int) -> ResolutionPlan:
        if pixels not in self._plans:
            self._plans[pixels] = self._planned(pixels)
        return self._plans[pixels]

    def _planned(self, pixels: int) -> ResolutionPlan:
        timeline, calls = self.at(pixels)
        budget = self.memory - timeline.held_at_attention([AttentionCost(self._kept_bytes(call), 0) for call in calls])
        answers = {call: self._answer(call, budget) for call in set(calls)}
        plans = [plan for call in calls if isinstance(plan := answers[call], SlicePlan)]
        costs: dict[Way, list[AttentionCost]] = {}
        if self._full_upcasts is not None:
            costs["full attention"] = [full_attention_cost(call, upcast=self._full_upcasts) for call in calls]
        if "fused" in self.ways:
            costs["fused"] = [fused_attention_cost(call) for call in calls]
        if len(plans) == len(calls):
            costs["slicemod"] = [planned_attention_cost(call, plan) for call, plan in zip(calls, plans, strict=True)]
        peaks: dict[Way, StepPeak | None] = {way: timeline.peak(cost) for way, cost in costs.items()}
        if self._swapped:
            budget, peaks["slicemod"] = self._plan_swapped(pixels)
        elif self._strips:
            budget, peaks["slicemod"] = self._plan_strips(pixels, [answers[call] for call in calls], budget)
        counted = Counter(calls[: self._traced[0].layers])
        largest_first = sorted(counted.items(), key=lambda item: -item[0].shape.scores_bytes)
        return ResolutionPlan(
            pixels,
            budget,
            tuple(LayerPlan(call.shape, layers, answers[call]) for call, layers in largest_first),
            {way: peak for way, peak in peaks.items() if peak is not None},
            next((plan for call in answers if isinstance(plan := self._answer(call, AMPLE), ObstacleError)), None),
        )

    def _kept_bytes(self, call: Any) -> int:
        """What an attention call keeps for the backward pass, by its plan if memory does not matter."""
        if not isinstance(call, CallSpec) or not call.training:
            return 0
        plan = self._answer(call, AMPLE)
        return planned_attention_cost(call, plan).kept if isinstance(plan, SlicePlan) else 0

    def _plan_swapped(self, pixels: int) -> tuple[int, StepPeak | None]:
        """The budget that the rest of the step leaves to swapped layers, and the peak; None if they do not fit."""
        step = self._between(self._swapped, pixels)
        kept = [AttentionCost(self._kept_bytes(call), 0) for call in step.calls]
        budget = self.memory - step.timeline.held_at_attention(kept)
        # Attention gets what the projections of the layer leave, and all layers the same.
        budget -= max((call.held for call in step.calls if isinstance(call, LayerCall)), default=0)
        costs = {call: self._swapped_cost(call, budget) for call in set(step.calls)}
        found = [cost for call in step.calls if (cost := costs[call]) is not None]
        return budget, step.timeline.peak(found) if len(found) == len(step.calls) else None

    def _plan_strips(
        self, pixels: int, attention: Sequence[SlicePlan | Refusal], budget: int
    ) -> tuple[int, StepPeak | None]:
        """The budget of an autoencoder whose layers go through in strips, and the peak; None if it does not fit."""
        timeline = self._step(pixels).timeline
        edge = pixels // self._input_pixels
        found = strips_within(
            self._strips,
            (self.kind.batch, edge, edge),
            Convolving.of(self.kind.dtype, self.kind.device_type),
            self.memory - timeline.weights,
        )
        plans = [plan for plan in attention if isinstance(plan, SlicePlan)]
        if found is None or len(plans) < len(attention):
            return budget, None
        held = timeline.held_at_attention([AttentionCost(0, 0)] * len(plans)) - timeline.weights
        most = max((held + plan.peak_bytes for plan in plans), default=0)
        return min(budget, found.budget), StepPeak(timeline.weights, max(found.plan.peak_bytes, most), 0, 0, 0)

    def _swapped_cost(self, call: Any, budget: int) -> AttentionCost | None:
        if isinstance(call, FeedForwardShape):
            return self._feed_forward_cost(call, budget)
        attention = call.attention if isinstance(call, LayerCall) else call
        if attention is None:
            return AttentionCost(0, 0)
        plan = self._answer(attention, budget)
        if not isinstance(plan, SlicePlan):
            return None
        cost = planned_attention_cost(attention, plan)
        return cost._replace(working=call.working(cost.working)) if isinstance(call, LayerCall) else cost

    def _feed_forward_cost(self, call: FeedForwardShape, budget: int) -> AttentionCost | None:
        try:
            plan = plan_feed_forward(call, budget, self.kind.device_type)
        except NotEnoughMemoryError:
            return None
        # What a chunk gives is copied into the output, which exists already. A single chunk is the output.
        own = call.tokens * call.out * call.itemsize if plan.steps == 1 else 0
        return AttentionCost(0, plan.peak_bytes - own)

    def _answer(self, call: CallSpec, budget: int) -> SlicePlan | Refusal:
        if budget < 1:
            return NotEnoughMemoryError(
                f"memory: expected more than the {self.memory - budget:,} bytes that the step holds beside its "
                f"attention; got {self.memory:,}. Lower the resolution or the batch."
            )
        try:
            return choose(call, replace(self.slicing, budget=budget), budget)
        except (NotEnoughMemoryError, ObstacleError) as error:
            return error


def _swaps(kind: StepKind, slicing: SliceConfig, *, swapped: bool) -> StepKind:
    """The step of a swapped UNet; the kind itself, if its layers are left whole.

    So they are in inference where the user decides how attention is sliced, and where their weights come and go.
    """
    if kind.training:
        return kind._replace(swapped=swapped and bool(slicing.checkpoint), recomputes_layers=slicing.recomputes_layers)
    return kind._replace(swapped=swapped and not (kind.streams_weights or slicing.kernel == "math" or slicing.steps))
