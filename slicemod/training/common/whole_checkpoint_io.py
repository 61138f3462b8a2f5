"""Writes Lightning's checkpoints whole or not at all, and keeps the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from slicemod.whole_file import replacing

PREVIOUS = "previous"  # what last.ckpt is renamed to when a new one is whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file, then takes its place; ``last.ckpt`` becomes ``previous.ckpt`` then.

    Lightning's own way holds the file in memory besides and may copy it into place from another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Raises:
            UserError: there is no room or no permission; what was there is left as it is.
        """
        target = Path(path)
        is_last = target.stem.startswith("last")
        previous = target.with_name(target.name.replace("last", PREVIOUS, 1)) if is_last else None
        with replacing(target, keep_as=previous) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # torch's zip writer says this of a full disk
                raise OSError(str(error).splitlines()[0]) from error
