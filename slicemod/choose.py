"""Chooses the kernel of a call: asks each of `KERNELS` in order, and can say why the better ones were passed over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import NamedTuple

import torch

from slicemod import kernels
from slicemod.call import AttentionShape, CallSpec
from slicemod.config import SliceConfig
from slicemod.kernels.crossover_table import CrossoverTable
from slicemod.kernels.kernel import Kernel
from slicemod.kernels.sliced.planner import plan_by_policy
from slicemod.kernels.sliced.slices import Conditions
from slicemod.kernels.table_in_use import given_table, table_for
from slicemod.memory.budget import AMPLE
from slicemod.memory.sizes import exact_size_text
from slicemod.plan import NotEnoughMemoryError, ObstacleError, SlicePlan, largest_square, not_enough


class Answer(NamedTuple):
    """What one kernel answers to a call.

    Attributes:
        kernel: the kernel's name.
        plan: its plan; None if it has none.
        passed_over: why this kernel is not chosen; None for the chosen one.
    """

    kernel: str
    plan: SlicePlan | None
    passed_over: str | None

    def __str__(self) -> str:
        return f"{self.plan or self.kernel}: {self.passed_over or 'taken'}"


def answers(call: CallSpec, slicing: SliceConfig, free_bytes: int) -> list[Answer]:
    """What every kernel answers to a call, best kernel first. At most one is chosen; the others say why they are not.

    >>> shape = AttentionShape(2, 8, 4096, 4096, 40, 4)
    >>> found = answers(CallSpec.planned(shape, "cpu"), SliceConfig(kernel="math"), 2**30)
    >>> [(answer.kernel, answer.passed_over) for answer in found][-1]
    ('math', None)
    """
    taken: str | None = None
    found = []
    for kernel in kernels.KERNELS:
        plan, reason = _ask(kernel, call, slicing, free_bytes)
        if reason is None and taken is not None:
            reason = f"{taken} comes before it"
        taken = kernel.name if reason is None else taken
        found.append(Answer(kernel.name, plan, reason))
    return found


def _ask(kernel: Kernel, call: CallSpec, slicing: SliceConfig, free_bytes: int) -> tuple[SlicePlan | None, str | None]:
    """The kernel's plan, and why it cannot be chosen for the call (None if it can)."""
    if slicing.kernel not in ("auto", kernel.name):
        return None, f'kernel="{slicing.kernel}" is asked for'
    if slicing.steps is not None and not kernel.takes_steps:
        return None, f"steps={slicing.steps} is given, and it decides itself"
    if (obstacle := kernel.obstacle(call)) is not None:
        return None, obstacle
    if slicing.kernel == "auto" and not kernel.pays_off(call, table := table_for(call.device)):
        slower = table.is_faster(kernel.name, call) is False
        return None, f"it is {'measured to be slower' if slower else 'not known to be faster'} for a call of this size"
    try:
        plan = kernel.plan(call, free_bytes, slicing.terms)
    except NotEnoughMemoryError as error:
        return None, str(error)
    if plan is None:
        return None, f"it needs more than {exact_size_text(free_bytes)}"
    return plan, None


def choose(call: CallSpec, slicing: SliceConfig, free_bytes: int) -> SlicePlan:
    """The plan of a call that may allocate `free_bytes` bytes.

    Raises:
        NotEnoughMemoryError: no plan fits.
        ObstacleError: the kernel that is asked for cannot run the call.
    """
    return _choose(call, slicing, free_bytes, kernels.KERNELS, given_table())


@lru_cache(maxsize=4096)  # a UNet asks the same for each layer and step
def _choose(
    call: CallSpec, slicing: SliceConfig, free_bytes: int, asked: tuple[Kernel, ...], _given: CrossoverTable | None
) -> SlicePlan:
    for kernel in asked:
        plan, _ = _ask(kernel, call, slicing, free_bytes)
        if plan is not None:
            return plan
    raise _refusal(call, slicing, free_bytes, asked)


def _refusal(
    call: CallSpec, slicing: SliceConfig, free_bytes: int, asked: tuple[Kernel, ...]
) -> NotEnoughMemoryError | ObstacleError:
    """The error for a call that no kernel takes: the reason of the kernel that was asked for, or of the last one."""
    kernel = next((kernel for kernel in asked if kernel.name == slicing.kernel), asked[-1])
    obstacle = kernel.obstacle(call)
    if obstacle is not None:
        return ObstacleError(
            f'kernel: expected a call that it computes, since kernel="{kernel.name}"; {obstacle}. '
            'Take kernel="auto" or kernel="math".'
        )
    try:
        kernel.plan(call, free_bytes, slicing.terms)
    except NotEnoughMemoryError as error:
        return error
    unlimited = kernel.plan(call, AMPLE, slicing.terms)
    need = 0 if unlimited is None else unlimited.peak_bytes

    def fits(shape: AttentionShape) -> bool:
        return kernel.plan(replace(call, shape=shape), free_bytes, slicing.terms) is not None

    side = largest_square(call.shape, fits)
    who = f'kernel="{kernel.name}" with budget={slicing.budget!r}'
    return not_enough(who, need, free_bytes, call.shape, side, 'Take kernel="auto", which slices, raise the budget')


@dataclass(frozen=True)
class CallPlans:
    """Everything that the plan of a call depends on, except the free memory.

    Attributes:
        call: the call.
        slicing: the user's settings.
        best: the plan if memory does not matter. None if every plan depends on the free memory, as with the policies of
            the webui.
    """

    call: CallSpec
    slicing: SliceConfig
    best: SlicePlan | None

    def now(self) -> SlicePlan:
        """The plan for the memory that is free now. It is read only if the budget is a share of it and the last reading
        does not answer the question.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
            ObstacleError: the kernel that is asked for cannot run the call.
        """
        best, device, budget = self.best, self.call.device, self.slicing.parsed_budget
        if best is not None and budget.surely_allows(best.peak_bytes, device):
            return best
        available = budget.bytes_on(device)
        if best is not None and 0 < available >= best.peak_bytes:
            return best
        return choose(self.call, self.slicing, available)


def plans_of(call: CallSpec, slicing: SliceConfig) -> CallPlans:
    """The plans of a call; the free memory later picks one of them."""
    # The free memory changes from call to call. The best plan stays the best one wherever it fits, except under the
    # webui's policies, whose slices depend on the free memory.
    for kernel in kernels.KERNELS:
        if kernel.takes_steps and slicing.policy != "exact":
            break
        plan, _ = _ask(kernel, call, slicing, AMPLE)
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

    The webui's policies decide by their own arithmetic, even if their plan takes more than `free_bytes`. An attention
    call would refuse such a plan.

    Args:
        shape: sizes of the call.
        free_bytes: bytes that may be allocated beyond inputs and output.
        policy: "exact", "heuristic", "doggettx", "invokeai" or "mps".
        device_type: "cuda", "cpu", "mps" and so on; some rules depend on it.
        kernel: "math" for the sliced kernel, or the name of another one of `slicemod.kernels.KERNELS`.
        training: plan for a backward pass too.
        checkpoint: the backward pass recomputes each slice.
        steps: the number of slices along the queries, instead of the policy's choice.

    Returns:
        The plan.

    Raises:
        NotEnoughMemoryError: no plan fits.
        ValueError: the policy or kernel is unknown, the kernel cannot run the call or takes no steps, or `steps` is not
            a whole number of 1 or more.
        TypeError: `free_bytes` is not a finite number.

    >>> plan_slices(AttentionShape(2, 10, 4096, 4096, 64, 2), 1_825_361_100, policy="heuristic").steps
    4
    """
    slicing = SliceConfig(policy=policy, kernel=kernel, steps=steps, checkpoint=checkpoint)
    if isinstance(free_bytes, bool) or not isinstance(free_bytes, int | float) or not isfinite(free_bytes):
        raise TypeError(
            f"free_bytes: expected a finite number of bytes; got {free_bytes!r}. "
            'slicemod.memory.budget.Budget.parse("1GiB").bytes reads sizes.'
        )
    free_bytes = max(0, int(free_bytes))
    if kernels.kernel_named(kernel).takes_steps:
        given = Conditions(free_bytes, device_type, training, slicing.terms.checkpoint)
        return plan_by_policy(shape, given, policy, steps)
    call = CallSpec.planned(shape, torch.device(device_type), training=training)
    return choose(call, slicing, free_bytes)
