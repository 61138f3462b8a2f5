"""What the training tests share: one small model, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import train_tiny


@pytest.fixture(scope="session")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of the tiny configuration that used the UNet's own attention."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_tiny(folder, "--attention", "null")
    return folder


@pytest.fixture(scope="session")
def base_checkpoint(base_run: Path) -> Path:
    """The last checkpoint of ``base_run``."""
    return base_run / "runs" / "digits" / "checkpoints" / "last.ckpt"
