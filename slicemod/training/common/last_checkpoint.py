"""The checkpoint that a run continues from."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from slicemod.training.common.stop_signals import TrainingInterruptedError
from slicemod.user_error import UserError


class LastCheckpoint(ModelCheckpoint):
    """Keeps one ``last.ckpt``, also where a signal or an exception ends the run.

    ``ModelCheckpoint(save_last=True)`` by itself leaves out the steps after its last regular save.

    Args:
        dirpath: folder of the checkpoints; None is `checkpoints` in the run's folder, ``trainer.default_root_dir``.
        every_n_train_steps: steps between two saves.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 100) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{step}",
            save_top_k=0,
            save_last=True,
            save_on_exception=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,  # a run has one last.ckpt, whatever lies in its folder
        )
        self._training = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Removes what a process that was killed while it wrote left behind."""
        self.dirpath = str(self.folder(trainer))
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for left in Path(str(self.dirpath)).glob(".last*.ckpt"):
                left.unlink()

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the checkpoints are kept."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save."""
        super().on_train_start(trainer, pl_module)
        self._training = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves `last.ckpt` alone, where ``ModelCheckpoint`` leaves a second file of the step beside it.

        Not where the loss or the disk failed, nor before the first step or in the middle of one: what there was before
        is better than what there is now.
        """
        halfway = isinstance(exception, TrainingInterruptedError) and not exception.between_steps
        if isinstance(exception, UserError) or halfway or not self._training:
            return
        if self._should_save_on_exception(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves once more, with the optimizer's state."""
        super().on_train_end(trainer, pl_module)
        if self.last_model_path:
            trainer.save_checkpoint(self.last_model_path, weights_only=False)  # the optimizer's state too


def last_checkpoint(trainer: pl.Trainer) -> str | None:
    """The last.ckpt that the run wrote, or None where it wrote none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.last_model_path:
            return str(callback.last_model_path)
    return None
