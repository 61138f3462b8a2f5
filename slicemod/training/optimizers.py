"""An optimizer and a schedule that steps once a training step, from what the configuration names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import lightning.pytorch as pl
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
        UserError: the schedule ends before the run does.
    """
    built = optimizer(parameters)
    if lr_scheduler is None:
        return built
    schedule = lr_scheduler(built)
    planned: Any = trainer.estimated_stepping_batches
    total = getattr(schedule, "total_steps", planned)
    if total < planned:
        raise UserError(
            f"model.lr_scheduler.init_args.total_steps must be at least the run's {planned} steps, got"
            f" {total}: raise it, or lower trainer.max_steps."
        )
    stepped = LRSchedulerConfigType(scheduler=schedule, interval="step")
    return OptimizerLRSchedulerConfig(optimizer=built, lr_scheduler=stepped)
