"""SliceConfig: what a user asks of sliced attention, and the plan that answers it for one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed

from slicemod.cpu_kernels import NO_CPU_KERNELS, CpuKernels, float32_flash_plan, native_plan
from slicemod.cuda_fused import processors_of
from slicemod.memory.budget import Budget
from slicemod.plan import (
    POLICIES,
    NotEnoughMemoryError,
    Policy,
    SlicePlan,
    fused_peak,
    largest_square,
    plan_slices,
)
from slicemod.shapes import AttentionShape

if TYPE_CHECKING:  # a PyTorch built without distributed has no such class
    from torch.distributed import ProcessGroup

KERNELS = ("auto", "fused", "math")


_ALL_THERE_COULD_BE = 2**62  # bytes


@dataclass(frozen=True)
class SliceConfig:
    """How attention is to be sliced.

    Args:
        budget: what the attention may allocate beyond its inputs and its output: "auto" (the free memory), bytes,
            a size such as "512MiB", or a fraction of the free memory such as 0.25. 1 is a byte, 1.0 all that is free.
        policy: who decides the number of slices: "heuristic", "doggettx", "invokeai", "mps" or "exact".
        kernel: "fused", PyTorch's fused attention; "math", the sliced one; "auto", the faster of the kernels that are
            certain to run and that the budget allows: on a CPU the native one where it can be built, or the fused one;
            the sliced one otherwise.
        steps: pins the number of slices along the query.
        checkpoint: recompute each slice in the backward pass; otherwise keep its weights, as autograd does.
        upcast: compute scores in float32.

    Raises:
        ValueError: a field has none of its accepted values.
    """

    budget: int | float | str = "auto"
    policy: Policy = "heuristic"
    kernel: Literal["auto", "fused", "math"] = "auto"
    steps: int | None = None
    checkpoint: bool = True
    upcast: bool = False
    parsed_budget: Budget = field(init=False, repr=False)  # 1 == 1.0, but a budget of one is not one of the other

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed_budget", Budget.parse(self.budget))
        if not isinstance(self.policy, str) or self.policy not in POLICIES:
            raise ValueError(
                f"policy: expected one of {', '.join(POLICIES)}; got {self.policy!r}. Choose one of these."
            )
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}; got {self.kernel!r}. Choose one of these.")
        steps: object = self.steps
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(
                f"steps: expected a whole number of slices, 1 or more, or None; got {steps!r}. Leave it out to plan."
            )
        if steps is not None and self.kernel == "fused":
            raise ValueError(
                f'steps: a fused kernel is never sliced; got steps={steps} with kernel="fused". '
                'Leave steps out, or take kernel="math".'
            )
        for name in ("checkpoint", "upcast"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false; got {getattr(self, name)!r}. Write one of these.")

    @classmethod
    def of(cls, slicing: SliceConfig | Mapping[str, Any] | None) -> SliceConfig:
        """The config itself, the config of a mapping of its fields, or the default one for None.

        Raises:
            ValueError: a key is no field of SliceConfig.
            TypeError: `slicing` is something else.

        >>> SliceConfig.of({"budget": "64MiB", "policy": "exact"}).policy
        'exact'
        """
        if slicing is None:
            return cls()
        if isinstance(slicing, SliceConfig):
            return slicing
        if not isinstance(slicing, Mapping):
            raise TypeError(
                f"slicing: expected a SliceConfig, a dict of its fields or None; got {type(slicing).__name__}. "
                'Pass for example {"budget": "64MiB", "policy": "exact"}.'
            )
        names = cls._names()
        if unknown := [key for key in slicing if key not in names]:
            raise ValueError(
                f"slicing: expected keys out of {', '.join(names)}; got {', '.join(map(repr, unknown))}. "
                "Correct the key."
            )
        return cls(**slicing)

    def __str__(self) -> str:
        changed = (
            f"{name}={value!r}"
            for name, value in self.as_dict().items()
            if name in ("budget", "policy", "kernel") or value != self.__dataclass_fields__[name].default
        )
        return ", ".join(changed)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a config file."""
        return {name: getattr(self, name) for name in self._names()}

    @classmethod
    def _names(cls) -> list[str]:
        return [each.name for each in fields(cls) if each.init]

    def resolved(self, device: torch.device | str, group: ProcessGroup | None = None) -> SliceConfig:
        """The same config with its budget in bytes, as it is now: what every later call plans with.

        Under `torch.distributed` the smallest budget of all ranks, so that their plans agree, whatever each has free.
        All ranks have to call it, at one point of the program, such as the start of a fit.

        Args:
            device: where the attention will run; its free memory is read where the budget refers to it.
            group: ranks that have to agree; all of them when left out.

        Raises:
            NotEnoughMemoryError: a rank has nothing free.

        >>> SliceConfig(budget="2MiB").resolved("cpu").budget
        2097152
        """
        device = torch.device(device)
        available = self.parsed_budget.bytes_on(device)
        if distributed.is_available() and distributed.is_initialized():
            smallest = torch.tensor(available, device=device)
            distributed.all_reduce(smallest, distributed.ReduceOp.MIN, group)
            available = int(smallest)
        if available < 1:
            raise NotEnoughMemoryError(
                f"budget: {self.budget!r} needs free memory on {device}; got {available:,} bytes on the smallest "
                "rank. Free memory on the device or name a budget in bytes."
            )
        return replace(self, budget=available)

    def plan(
        self,
        shape: AttentionShape,
        device: torch.device,
        *,
        training: bool,
        fused_obstacle: str | None,
        cpu: CpuKernels = NO_CPU_KERNELS,
        processors: int | None = None,
    ) -> SlicePlan:
        """The plan of one call. Reads the free memory where the budget refers to it.

        Args:
            shape: sizes of the call.
            device: where it runs.
            training: gradients will be needed.
            fused_obstacle: why no fused kernel would run, or None if one would.
            cpu: what this processor has for the dtype beside PyTorch's fused kernel.
            processors: streaming multiprocessors of a GPU; those of `device` when left out.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
            ValueError: `kernel="fused"` and there is an obstacle.
        """
        return self.plans(
            shape, device, training=training, fused_obstacle=fused_obstacle, cpu=cpu, processors=processors
        ).now()

    def plans(
        self,
        shape: AttentionShape,
        device: torch.device,
        *,
        training: bool,
        fused_obstacle: str | None,
        cpu: CpuKernels = NO_CPU_KERNELS,
        processors: int | None = None,
    ) -> CallPlans:
        """The plans of one call, from which what is free picks one; arguments and errors are those of `plan`."""
        given = (
            *(device.type, training, fused_obstacle, cpu, processors or processors_of(device)),
            *(torch.get_num_threads(), POLICIES[self.policy]),
        )
        best = None
        if self.kernel != "math" and self.steps is None:
            # What is free differs from call to call, and the same kernel is the best in all that it fits into.
            best = _plan(self, shape, _ALL_THERE_COULD_BE, *given)
        best = None if best is None or best.kernel == "math" else best
        return CallPlans(self, shape, device, given, best)

    def _cpu_plan(
        self, shape: AttentionShape, available: int, training: bool, fused_obstacle: str | None, cpu: CpuKernels
    ) -> SlicePlan | None:
        threads = torch.get_num_threads()
        plan = None
        if cpu.native is not None and self.kernel == "auto":
            plan = native_plan(shape, cpu.native, available, policy=self.policy, training=training, threads=threads)
        if plan is None and cpu.converts is not None and fused_obstacle is None:
            plan = float32_flash_plan(
                shape, cpu.converts, available, policy=self.policy, training=training, threads=threads
            )
        return plan

    def _over_budget(
        self, plan: SlicePlan, available: int, shape: AttentionShape, advice: str, side: int
    ) -> NotEnoughMemoryError:
        return NotEnoughMemoryError(
            f"budget: {self.budget!r} allows {available:,} bytes and the plan needs {plan.peak_bytes:,} ({plan}), "
            f"for {shape}. Raise the budget, {advice} or lower the resolution: at most about {side}x{side} would fit."
        )


@dataclass(frozen=True)
class CallPlans:
    """All that the plan of a call depends on, but for the memory that is free.

    Attributes:
        slicing: what was asked for.
        shape: sizes of the call.
        device: where it runs.
        given: the further arguments of `_plan`.
        best: the plan where there is memory enough for it, if that is not of the sliced kernel.
    """

    slicing: SliceConfig
    shape: AttentionShape
    device: torch.device
    given: tuple[Any, ...]
    best: SlicePlan | None

    def now(self) -> SlicePlan:
        """The plan for what is free now, which is read where the budget refers to it and no recent reading will do.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
        """
        best, budget = self.best, self.slicing.parsed_budget
        if best is not None and budget.surely_allows(best.peak_bytes, self.device):
            return best
        available = budget.bytes_on(self.device)
        if best is not None and 0 < available >= best.peak_bytes:
            return best
        return _plan(self.slicing, self.shape, available, *self.given)


@lru_cache(maxsize=4096)  # a UNet asks the same for each layer and step
def _plan(
    slicing: SliceConfig,
    shape: AttentionShape,
    available: int,
    device_type: str,
    training: bool,
    fused_obstacle: str | None,
    cpu: CpuKernels,
    processors: int,
    *_on_what_else_it_depends: object,
) -> SlicePlan:
    """The plan that fits in `available` bytes."""
    if slicing.kernel == "fused" and fused_obstacle is not None:
        raise ValueError(
            f'kernel: expected a call that a fused kernel computes, since kernel="fused"; {fused_obstacle}. '
            'Take kernel="auto" or kernel="math".'
        )
    if slicing.kernel != "math" and slicing.steps is None:
        plan = slicing._cpu_plan(shape, available, training, fused_obstacle, cpu)
        if plan is not None:
            return plan
    if slicing.kernel != "math" and fused_obstacle is None and slicing.steps is None:

        def peak(shape: AttentionShape) -> int:
            return fused_peak(shape, device_type, training=training, products=cpu.products, processors=processors)

        fused = plan_slices(
            shape,
            available,
            policy=slicing.policy,
            device_type=device_type,
            kernel="fused",
            training=training,
        )
        fused = replace(fused, peak_bytes=peak(shape))
        if fused.peak_bytes <= available:
            return fused
        if slicing.kernel == "fused":
            side = largest_square(shape, lambda shape: peak(shape) <= available)
            raise slicing._over_budget(fused, available, shape, 'take kernel="auto", which slices', side)
    shape = replace(shape, upcast=shape.upcast or slicing.upcast)

    def sliced(shape: AttentionShape) -> SlicePlan:
        return plan_slices(
            shape,
            available,
            policy=slicing.policy,
            device_type=device_type,
            training=training,
            checkpoint=slicing.checkpoint,
            steps=slicing.steps,
        )

    plan = sliced(shape)
    if slicing.budget != "auto" and plan.peak_bytes > available:
        # Some policies look at other things than the budget; a budget that was named is kept all the same.
        advice = "leave steps out" if slicing.steps is not None else 'take policy="exact"'
        side = largest_square(shape, lambda shape: sliced(shape).peak_bytes <= available)
        raise slicing._over_budget(plan, available, shape, advice, side)
    return plan
