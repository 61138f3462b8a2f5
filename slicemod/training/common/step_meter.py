"""Logs of each training step: images a second, peak memory, and the plan of the attention."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from slicemod import SlicePlan, SwapReport


class StepMeter(pl.Callback):
    """Logs ``speed/images_per_s``, ``memory/peak_bytes``, ``plan/peak_bytes`` and ``plan/steps``.

    The peak is the device allocator's, of this step alone; on a CPU, whose allocator keeps none, it is the most that
    the process ever had resident, ``memory/peak_resident_bytes``. The plan is that of the layer that needs most.
    The plans of each image size are printed once and go to TensorBoard as text. Compiled layers tell no plan.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._seen: set[tuple[int, ...]] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Starts the clock."""
        if pl_module.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs seconds, peak memory and slices of the batch."""
        if pl_module.device.type == "cpu":
            peak = _peak_resident()
        else:
            torch.accelerator.synchronize(pl_module.device)
            peak = {"memory/peak_bytes": torch.accelerator.max_memory_allocated(pl_module.device)}
        seconds = time.perf_counter() - self._start
        measured = {name: float(value) for name, value in peak.items()}
        measured["speed/images_per_s"] = batch["total"] / seconds
        plans = current_plans(getattr(pl_module, "swap_report", None))
        if plans:
            largest = max(plans.values(), key=lambda plan: plan.peak_bytes)
            measured |= {"plan/peak_bytes": float(largest.peak_bytes), "plan/steps": float(largest.steps)}
            self._tell(trainer, tuple(batch["mean"].shape), plans)
        pl_module.log_dict(measured, batch_size=len(batch["mean"]))

    def _tell(self, trainer: pl.Trainer, shape: tuple[int, ...], plans: dict[str, SlicePlan]) -> None:
        if shape in self._seen or not trainer.is_global_zero:
            return
        self._seen.add(shape)
        lines = [f"  {name}: {plan}" for name, plan in plans.items()]
        text = "\n".join([f"plans for latents {'x'.join(map(str, shape))}", *lines])
        print(text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("plan", f"```\n{text}\n```", trainer.global_step)


def _peak_resident() -> dict[str, int]:
    """The most that the process ever had resident; nothing where the system keeps no such count, on Windows."""
    try:
        import resource
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # kibibytes on Linux
    return {"memory/peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def current_plans(report: SwapReport | None) -> dict[str, SlicePlan]:
    """The plan of each swapped layer's last eager call, by the layer's name."""
    return {} if report is None else report.attention_plans
