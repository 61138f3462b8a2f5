"""Ctrl-C, SIGTERM and SIGUSR1 end a training run between two steps, where its state is whole."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from slicemod.training.common.stop_signals import SIGNALS, TrainingInterruptedError


class StopBetweenSteps(pl.Callback):
    """Turns the first of these signals into a ``TrainingInterruptedError`` at the end of the running step.

    A signal's handler runs anywhere, also halfway through an optimizer's step; a checkpoint taken there would hold
    half of it. At the end of a step, ``LastCheckpoint`` then writes one that
    `--ckpt_path last` continues from. A second signal acts as if this callback were not there. Of several processes
    one that gets the signal is enough.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._step = 0
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on signals are noted."""
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other thread
            self._received = None
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Notes the step, which tells at the batch's end whether it is done."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Ends training here, between two steps, if any process got a signal."""
        if trainer.global_step == self._step:
            return  # gradients are still accumulating, and no checkpoint holds them
        received = self._received
        if trainer.strategy.reduce_boolean_decision(received is not None, all=False):
            raise TrainingInterruptedError(received or signal.SIGTERM, between_steps=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Signals do again what they did before."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same, and an interruption says after which step it came."""
        self._restore()
        if isinstance(exception, TrainingInterruptedError):
            exception.step = trainer.global_step

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        self._restore()
        print("\nstopping after this step; the same signal again stops at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
