"""`last.ckpt` keeps its name until the next one is whole, and the checkpoint before it is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slicemod.training.common.checkpoints import read_checkpoint
from slicemod.training.common.whole_checkpoint_io import WholeCheckpointIO
from slicemod.user_error import UserError


def save(path: Path, step: int) -> None:
    WholeCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": step}, path)


def test_the_checkpoint_before_the_last_one_is_kept(tmp_path: Path) -> None:
    for step in (3, 5, 7):
        save(tmp_path / "last.ckpt", step)
    found = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.iterdir()}
    assert found == {"last.ckpt": 7, "previous.ckpt": 5}


def test_a_disk_that_fails_while_the_file_is_flushed_leaves_both_checkpoints_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 5):
        save(tmp_path / "last.ckpt", step)

    def fails(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written: no space left"):
        save(tmp_path / "last.ckpt", 7)
    found = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.iterdir()}
    assert found == {"last.ckpt": 5, "previous.ckpt": 3}
