"""SliceConfig: what a user asks of sliced attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import distributed

from slicemod import kernels
from slicemod.kernels.kernel import Kernel, Terms
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.memory.budget import Budget
from slicemod.plan import NotEnoughMemoryError


@dataclass(frozen=True)
class SliceConfig:
    """The user's settings: how much memory attention may take, and how it is computed.

    Args:
        budget: what the attention may allocate beyond its inputs and its output. "auto" is all the free memory, and a
            share such as 0.25 is this part of it. Bytes are a whole number, or a size such as "512MiB" or "2gib".
            1 is one byte; 1.0 is all the free memory.
        policy: who chooses the slices of the sliced kernel: "exact", or one of the rules of AUTOMATIC1111's webui,
            "heuristic", "doggettx", "invokeai" or "mps".
        kernel: "auto" for the first of `slicemod.kernels.KERNELS` that is certain to run, pays off, and fits the
            budget. Or the name of one ("native", "fused-float32", "fused", "triton", "math"), which then
            raises if it cannot run a call.
        steps: fixes the number of slices along the queries. Only the sliced kernel ("math") can do this.
        checkpoint: what the backward pass computes again. True: the slices of the sliced kernel. "layer": also the
            projections of a layer, which then keeps only its inputs. False: nothing; the sliced kernel keeps the
            weights of all slices, as autograd does.
        upcast: the sliced kernel computes scores in float32.

    Raises:
        ValueError: a field has a value that is not accepted.
    """

    budget: int | float | str = "auto"
    policy: str = "exact"
    kernel: str = "auto"
    steps: int | None = None
    checkpoint: bool | Literal["layer"] = True
    upcast: bool = False

    # Also tells apart configs with budget=1 (a byte) and budget=1.0 (all that is free), which are equal in Python.
    parsed_budget: Budget = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed_budget", Budget.parse(self.budget))
        _expect_one_of("policy", self.policy, list(POLICIES))
        _expect_one_of("kernel", self.kernel, ["auto", *(kernel.name for kernel in kernels.KERNELS)])
        steps: object = self.steps
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(
                f"steps: expected a whole number of slices, 1 or more, or None; got {steps!r}. Leave it out to plan."
            )
        if steps is not None and self.kernel != "auto" and not kernels.kernel_named(self.kernel).takes_steps:
            raise ValueError(
                f"steps: expected none with this kernel, which decides itself; got steps={steps} with "
                f'kernel="{self.kernel}". Leave steps out, or take kernel="math".'
            )
        if not isinstance(self.checkpoint, bool) and self.checkpoint != "layer":
            raise ValueError(
                f'checkpoint: expected true, false or "layer"; got {self.checkpoint!r}. Write one of these.'
            )
        if not isinstance(self.upcast, bool):
            raise ValueError(f"upcast: expected true or false; got {self.upcast!r}. Write one of these.")

    @property
    def terms(self) -> Terms:
        """What the user asks of a plan, besides the budget."""
        return Terms(self.policy, self.steps, self.checkpoint is not False, self.upcast)

    @property
    def recomputes_layers(self) -> bool:
        """A layer keeps only its inputs for the backward pass, and computes all else again."""
        return self.checkpoint == "layer"

    @classmethod
    def of(cls, slicing: SliceConfig | Mapping[str, Any] | None) -> SliceConfig:
        """A config of what the user passed: a config itself, a mapping of its fields, or None for the default one.

        Raises:
            ValueError: a key is not a field of SliceConfig.
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
        try:
            # With their types, because a budget of 1 byte equals one of 1.0, which is all there is.
            return _of_fields(tuple((name, type(value), value) for name, value in slicing.items()), kernels.KERNELS)
        except TypeError:  # a list, say, where a word belongs: the config says so
            return cls(**slicing)

    def __str__(self) -> str:
        changed = (
            f"{name}={value!r}"
            for name, value in self.as_dict().items()
            if name in ("budget", "policy", "kernel") or value != self.__dataclass_fields__[name].default
        )
        return ", ".join(changed)

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dict, for a config file."""
        return {name: getattr(self, name) for name in self._names()}

    @classmethod
    def _names(cls) -> list[str]:
        return [each.name for each in fields(cls) if each.init]

    def resolved(self, device: torch.device | str) -> SliceConfig:
        """The same config with the budget in bytes, as it is now, so that every later call plans with the same number.

        Under `torch.distributed` this is the smallest budget of all ranks, so that the plans of all ranks agree. Then
        all ranks have to call this at the same point of the program, such as the start of a fit.

        Args:
            device: where the attention will run. Its free memory is read if the budget is a share of it.

        Raises:
            NotEnoughMemoryError: a rank has no free memory.

        >>> SliceConfig(budget="2MiB").resolved("cpu").budget
        2097152
        """
        device = torch.device(device)
        available = self.parsed_budget.bytes_on(device)
        if distributed.is_available() and distributed.is_initialized():
            smallest = torch.tensor(available, device=device)
            distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
            available = int(smallest)
        if available < 1:
            raise NotEnoughMemoryError(
                f"budget: {self.budget!r} needs free memory on {device}; got {available:,} bytes on the smallest "
                "rank. Free memory on the device or name a budget in bytes."
            )
        return replace(self, budget=available)


SETTINGS = SliceConfig.__match_args__  # for `plain_values`


@lru_cache(maxsize=256)  # a dict comes with every call of a function, and to check it takes microseconds
def _of_fields(named: tuple[tuple[str, type, Any], ...], _known: tuple[Kernel, ...]) -> SliceConfig:
    """The config of fields that were given before, for the same list of kernels."""
    return SliceConfig(**{name: value for name, _, value in named})


def _expect_one_of(name: str, value: object, known: list[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}. Choose one of these.")
