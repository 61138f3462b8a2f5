"""A loss or a gradient that is no finite number ends the training."""

from __future__ import annotations

from collections.abc import Sequence

from slicemod.user_error import UserError


class NonFiniteError(UserError):
    """The loss or a gradient became infinite or no number; no checkpoint is written after it.

    Args:
        name: what is not finite.
        value: what it is.
        step: the optimizer step, from 0 on.
        files: the images of the batch.
        checkpoint: the last one that was written before.
    """

    def __init__(self, name: str, value: float, step: int, files: Sequence[str], checkpoint: str | None) -> None:
        good = f"The last good checkpoint is {checkpoint}" if checkpoint else "No checkpoint was written before"
        super().__init__(
            f"the {name} is {value} in step {step}, whose batch holds {', '.join(files) or 'no files'}. {good}. Lower"
            " the learning rate, clip gradients (trainer.gradient_clip_val), use bf16-mixed in place of 16-mixed, or"
            " look at these files."
        )
        self.step = step
        self.files = list(files)
        self.checkpoint = checkpoint
