"""The signals that end a run in an orderly way, and the error that they become."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# By name: Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class TrainingInterruptedError(BaseException):
    """A signal stopped the run. No ``Exception``, which whatever reads files along the way might take for a bad file.

    Attributes:
        signum: the signal's number.
        between_steps: whether a training step was just done, so that its state is whole.
        step: steps that were done.
        checkpoint: what the run continues from.
        kept: a sentence on what is kept beside checkpoints.
    """

    def __init__(self, signum: int, *, between_steps: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.between_steps = between_steps
        self.step = 0
        self.checkpoint: str | None = None
        self.kept = ""


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Turns a signal into a ``TrainingInterruptedError`` wherever the program is, as Python does with Ctrl-C.

    What the block writes has to appear whole or not at all.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TrainingInterruptedError(signum)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes handlers from no other thread
        return
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
