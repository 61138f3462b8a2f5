"""`slicemod` with the letter encoders, as a process of its own that may kill itself: python -m ... fit --config ...

KILL_AT=<n> ends it by SIGKILL in batch n, from 0 on, KILL_WHILE_SAVING=<n> halfway through writing the n-th checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from slicemod.cli import main
from slicemod.training.common import whole_checkpoint_io
from slicemod.training.stable_diffusion import lightning_module
from tests.training.tiny_stable_diffusion import letter_encoders


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_batch(number: int) -> None:
    step = lightning_module.StableDiffusion.training_step
    seen: list[int] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if len(seen) == number:
            _die()
        seen.append(batch_idx)
        return step(self, batch, batch_idx)

    vars(lightning_module)["StableDiffusion"].training_step = training_step


def _kill_while_saving(number: int) -> None:
    save = torch.save
    seen: list[Any] = []

    def half(content: Any, path: Any) -> None:
        seen.append(path)
        save(content, path)
        if len(seen) == number:
            os.truncate(path, path.stat().st_size // 2)
            _die()

    vars(whole_checkpoint_io)["torch"] = type("torch", (), {"save": staticmethod(half)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    vars(lightning_module)["load_text_encoders"] = letter_encoders
    if "KILL_AT" in os.environ:
        _kill_in_batch(int(os.environ["KILL_AT"]))
    if "KILL_WHILE_SAVING" in os.environ:
        _kill_while_saving(int(os.environ["KILL_WHILE_SAVING"]))
    sys.exit(main())
