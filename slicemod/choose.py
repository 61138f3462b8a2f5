"""Which kernel takes a call, by asking each of `KERNELS` in its order, and why the better ones were passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from slicemod import kernels
from slicemod.call import AttentionShape, CallSpec
from slicemod.config import SliceConfig
from slicemod.kernels.kernel import Kernel
from slicemod.kernels.sliced.planner import POLICIES, plan_by_policy
from slicemod.kernels.sliced.slices import Conditions
from slicemod.memory.sizes import exact_size_text
from slicemod.plan import NotEnoughMemoryError, SlicePlan, largest_square, not_enough

_ALL_THERE_COULD_BE = 2**62  # bytes


class Answer(NamedTuple):
    """What one kernel says to a call.

    Attributes:
        kernel: its name.
        plan: its plan, if it has one.
        passed_over: why it is not taken; None for the one that is.
    """

    kernel: str
    plan: SlicePlan | None
    passed_over: str | None


def answers(call: CallSpec, slicing: SliceConfig, free_bytes: int) -> list[Answer]:
    """What every kernel says to a call, best first: one is taken at most, and the others say why they are not.

    >>> shape = AttentionShape(2, 8, 4096, 4096, 40, 4)
    >>> found = answers(CallSpec.planned(shape, "cpu"), SliceConfig(kernel="math"), 2**30)
    >>> [(answer.kernel, answer.passed_over) for answer in found][-1]
    ('math', None)
    """
    return list(_answers(call, slicing, free_bytes, kernels.KERNELS))


def _answers(call: CallSpec, slicing: SliceConfig, free_bytes: int, asked: tuple[Kernel, ...]) -> Iterator[Answer]:
    taken: str | None = None
    for kernel in asked:
        plan, reason = _ask(kernel, call, slicing, free_bytes)
        if reason is None and taken is not None:
            reason = f"{taken} comes before it"
        taken = kernel.name if reason is None else taken
        yield Answer(kernel.name, plan, reason)


def _ask(kernel: Kernel, call: CallSpec, slicing: SliceConfig, free_bytes: int) -> tuple[SlicePlan | None, str | None]:
    """Its plan, and why it is not to be taken for a call, or None if it is."""
    if slicing.kernel not in ("auto", kernel.name):
        return None, f'kernel="{slicing.kernel}" is asked for'
    if slicing.steps is not None and not kernel.takes_steps:
        return None, f"steps={slicing.steps} is given, and it decides itself"
    if (obstacle := kernel.obstacle(call)) is not None:
        return None, obstacle
    if slicing.kernel == "auto" and not kernel.pays_off(call):
        return None, "it is measured to be slower for a call of this size"
    try:
        plan = kernel.plan(call, free_bytes, slicing.terms)
    except NotEnoughMemoryError as error:
        return None, str(error)
    if plan is None:
        return None, f"it needs more than {exact_size_text(free_bytes)}"
    return plan, None


def choose(call: CallSpec, slicing: SliceConfig, free_bytes: int) -> SlicePlan:
    """The plan of a call for so many free bytes.

    Raises:
        NotEnoughMemoryError: no plan fits.
        ValueError: the kernel that is asked for cannot run the call.
    """
    return _choose(call, slicing, free_bytes, kernels.KERNELS)


@lru_cache(maxsize=4096)  # a UNet asks the same for each layer and step
def _choose(call: CallSpec, slicing: SliceConfig, free_bytes: int, asked: tuple[Kernel, ...]) -> SlicePlan:
    for kernel in asked:
        plan, _ = _ask(kernel, call, slicing, free_bytes)
        if plan is not None:
            return plan
    raise _refusal(call, slicing, free_bytes, asked)


def _refusal(
    call: CallSpec, slicing: SliceConfig, free_bytes: int, asked: tuple[Kernel, ...]
) -> NotEnoughMemoryError | ValueError:
    """Why no kernel takes the call, as the one that is asked for, or else the last one, says it."""
    kernel = next((kernel for kernel in asked if kernel.name == slicing.kernel), asked[-1])
    obstacle = kernel.obstacle(call)
    if obstacle is not None:
        return ValueError(
            f'kernel: expected a call that it computes, since kernel="{kernel.name}"; {obstacle}. '
            'Take kernel="auto" or kernel="math".'
        )
    try:
        kernel.plan(call, free_bytes, slicing.terms)
    except NotEnoughMemoryError as error:
        return error
    unlimited = kernel.plan(call, _ALL_THERE_COULD_BE, slicing.terms)
    need = 0 if unlimited is None else unlimited.peak_bytes

    def fits(shape: AttentionShape) -> bool:
        return kernel.plan(replace(call, shape=shape), free_bytes, slicing.terms) is not None

    side = largest_square(call.shape, fits)
    who = f'kernel="{kernel.name}" with budget={slicing.budget!r}'
    return not_enough(who, need, free_bytes, call.shape, side, 'Take kernel="auto", which slices, raise the budget')


@dataclass(frozen=True)
class CallPlans:
    """All that the plan of a call depends on, but for the memory that is free.

    Attributes:
        call: the call.
        slicing: what was asked for.
        best: the plan where there is memory enough for any.
    """

    call: CallSpec
    slicing: SliceConfig
    best: SlicePlan | None

    def now(self) -> SlicePlan:
        """The plan for what is free now, which is read where the budget refers to it and no recent reading will do.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
        """
        best, device, budget = self.best, self.call.device, self.slicing.parsed_budget
        if best is not None and budget.surely_allows(best.peak_bytes, device):
            return best
        available = budget.bytes_on(device)
        if best is not None and 0 < available >= best.peak_bytes:
            return best
        return choose(self.call, self.slicing, available)


def plans_of(call: CallSpec, slicing: SliceConfig) -> CallPlans:
    """The plans of a call, from which what is free picks one.

    Raises:
        ValueError: the kernel that is asked for cannot run the call.
    """
    # What is free differs from call to call, and the plan that is best is so in all that it fits into. But for the
    # webui's policies, whose sliced plans depend on what is free.
    for kernel in kernels.KERNELS:
        if kernel.takes_steps and slicing.policy != "exact":
            break
        plan, _ = _ask(kernel, call, slicing, _ALL_THERE_COULD_BE)
        if plan is not None:
            return CallPlans(call, slicing, plan)
    return CallPlans(call, slicing, None)


def plan_slices(
    shape: AttentionShape,
    free_bytes: int,
    *,
    policy: str = "exact",
    device_type: str = "cuda",
    kernel: str = "math",
    training: bool = False,
    checkpoint: bool = True,
    steps: int | None = None,
) -> SlicePlan:
    """Decide how one kernel computes attention of `shape` with `free_bytes` bytes.

    The webui's policies decide by their own arithmetic, to the letter, even if their plan takes more than is free; a
    call then refuses it.

    Args:
        shape: sizes of the call.
        free_bytes: bytes that may be allocated beyond inputs and output.
        policy: "exact", "heuristic", "doggettx", "invokeai" or "mps".
        device_type: "cuda", "cpu", "mps", ...: some rules depend on it.
        kernel: "math", the sliced kernel, or another one of `slicemod.kernels.KERNELS`.
        training: count the backward pass too.
        checkpoint: the backward pass recomputes each slice.
        steps: number of slices along the queries, instead of what the policy would choose.

    Returns:
        The plan.

    Raises:
        NotEnoughMemoryError: there is no plan that fits.
        ValueError: an unknown policy or kernel, a call that the kernel cannot run, or `steps` below 1.

    >>> plan_slices(AttentionShape(2, 10, 4096, 4096, 64, 2), 1_825_361_100, policy="heuristic").steps
    4
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; got {policy!r}. Choose one of these.")
    if isinstance(free_bytes, bool) or not isinstance(free_bytes, int | float):
        raise TypeError(
            f"free_bytes: expected a number of bytes; got {free_bytes!r}. "
            'slicemod.memory.budget.Budget.parse("1GiB").bytes reads sizes.'
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected a whole number of slices, 1 or more; got {steps}. Leave it out to plan.")
    free_bytes = max(0, int(free_bytes))
    if kernels.kernel_named(kernel).takes_steps:
        return plan_by_policy(shape, Conditions(free_bytes, device_type, training, checkpoint), policy, steps)
    call = CallSpec.planned(shape, torch.device(device_type), training=training)
    return choose(call, SliceConfig(policy=policy, kernel=kernel, steps=steps, checkpoint=checkpoint), free_bytes)
