"""The table that kernels are chosen by goes into checkpoints: by another one a resumed run would compute other bits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl

from slicemod.kernels.crossover_table import CrossoverTableError, table_of
from slicemod.kernels.table_in_use import TABLE_VARIABLE, table_in_use, table_used, using_table
from slicemod.training.common.checkpoints import CheckpointError

STORED_TABLE = "slicemod_kernel_table"  # where a checkpoint keeps it


class KeepsKernelTable(pl.Callback):
    """Stores the table that the process chooses kernels by, if it has chosen one by a table."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stores it."""
        if (used := table_used()) is not None:
            checkpoint[STORED_TABLE] = used.table.as_dict()


def checkpoints_table(checkpoint: Mapping[str, Any], path: str) -> tuple[AbstractContextManager[None], str | None]:
    """How a run that continues from a checkpoint chooses kernels, and what there is to say about it.

    It chooses by the checkpoint's table, whatever was measured on this machine. A table that the user pinned by
    `SLICEMOD_TABLE` goes before. A table for vectors of another kind is of no use, because these compute other bits.

    Args:
        checkpoint: as Lightning wrote it.
        path: its file.

    Returns:
        A context to run in, and a line for the user where this machine would choose by another table.

    Raises:
        CheckpointError: the checkpoint's table cannot be used.
    """
    if STORED_TABLE not in checkpoint:
        return nullcontext(), None
    pinned = os.environ.get(TABLE_VARIABLE)
    try:
        stored = table_of(checkpoint[STORED_TABLE], f"the table of kernels in {path}")
    except CrossoverTableError as error:
        if pinned:
            return nullcontext(), f"{error} {TABLE_VARIABLE}={pinned} serves."
        raise CheckpointError(f"{error} Set {TABLE_VARIABLE}=built-in to continue by this version's table.") from error
    own = table_in_use()
    if stored.rows == own.table.rows or not stored.rows:
        return nullcontext(), None
    this = f"this machine's ({own.source}: {own.table})"
    if stored.vectors != own.table.vectors:
        return nullcontext(), (
            f"kernels are chosen by {this}: the checkpoint was trained with {stored.vectors}, and other bits follow"
        )
    if pinned:
        return nullcontext(), (
            f"kernels are chosen by {TABLE_VARIABLE}={pinned}, and not by the checkpoint's table ({stored}): other "
            "bits may follow than from an uninterrupted run"
        )
    return using_table(stored, path), (
        f"kernels are chosen by the checkpoint's table ({stored}) and not by {this}, so that the same bits follow as "
        f"from an uninterrupted run. {TABLE_VARIABLE}=built-in, or a file, chooses otherwise"
    )
