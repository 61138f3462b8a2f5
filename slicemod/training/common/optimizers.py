"""An optimizer and a schedule that steps once a training step, from what the configuration names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import (
    LRSchedulerConfigType,
    OptimizerLRScheduler,
    OptimizerLRSchedulerConfig,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from slicemod.user_error import UserError

Made = TypeVar("Made")
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # what optimizers and schedules keep of a group


class WarmUp(LambdaLR):
    """The learning rate grows from zero over ``warmup_steps``, then stays or falls along half a cosine.

    Args:
        optimizer: whose rates are scaled.
        warmup_steps: steps until the full rate.
        decay: "constant" or "cosine".
        total_steps: where the cosine reaches zero, at least the run's steps; needed by "cosine".

    Raises:
        UserError: a number of steps is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        decay: Literal["constant", "cosine"] = "constant",
        total_steps: int | None = None,
    ) -> None:
        if warmup_steps < 0:
            raise UserError(f"lr_scheduler: warmup_steps must be at least 0, got {warmup_steps}: 0 leaves it out.")
        if decay == "cosine":
            if total_steps is None or total_steps <= warmup_steps:
                raise UserError(
                    f"lr_scheduler: total_steps must be above warmup_steps, {warmup_steps}, where decay is cosine, got"
                    f" {total_steps}: give trainer.max_steps."
                )
            self.total_steps = total_steps

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            if decay == "constant" or total_steps is None:
                return 1.0
            share = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            return 0.5 * (1 + math.cos(math.pi * share))

        super().__init__(optimizer, factor)


def build_optimizer(
    trainer: pl.Trainer,
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns.

    Raises:
        UserError: one of them cannot be built, a rate is negative, or the schedule ends before the run does.
    """
    built = _made("model.optimizer", optimizer, parameters)
    require_rates(built)
    if lr_scheduler is None:
        return built
    schedule = _made("model.lr_scheduler", lr_scheduler, built)
    require_rates(built)
    planned: Any = trainer.estimated_stepping_batches
    total = getattr(schedule, "total_steps", planned)
    if total < planned:
        raise UserError(
            f"model.lr_scheduler.init_args.total_steps must be at least the run's {planned} steps, got"
            f" {total}: raise it, or lower trainer.max_steps."
        )
    stepped = LRSchedulerConfigType(scheduler=schedule, interval="step")
    return OptimizerLRSchedulerConfig(optimizer=built, lr_scheduler=stepped)


def try_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
    """Builds both for one number, to find what is wrong with their arguments before any work is done.

    Raises:
        UserError: they cannot be built, or a rate is negative.
    """
    built = _made("model.optimizer", optimizer, [nn.Parameter(torch.zeros(1))])
    require_rates(built)
    if lr_scheduler is not None:
        _made("model.lr_scheduler", lr_scheduler, built)
        require_rates(built)


def _made(name: str, make: Callable[[Any], Made], given: Any) -> Made:
    try:
        return make(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{name} cannot be built: {error}. Correct its init_args.") from error


def require_rates(optimizer: Optimizer) -> None:
    """Checks the learning rates, which not every optimizer and schedule does.

    Raises:
        UserError: one is negative or no finite number.
    """
    for group in optimizer.param_groups:
        for name in RATES:
            rate = group.get(name, 0.0)
            if not 0 <= float(rate) < math.inf:
                raise UserError(
                    f"model.optimizer: the learning rate must be a number from 0 on, got {name} {float(rate)} from the"
                    " optimizer's lr or the schedule: 1e-4 is usual for adapters, 1e-5 for whole models."
                )
