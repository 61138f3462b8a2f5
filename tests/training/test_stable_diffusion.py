from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slicemod.training.checkpoints import read_checkpoint
from slicemod.training.fit_command import fit
from slicemod.training.pictures import read_metric
from slicemod.training.trained_weights import trained_names
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    write_config,
    write_images,
    write_tiny_model,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, in which captions are encoded by the letter encoders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slicemod.training.stable_diffusion.load_text_encoders", letter_encoders)
    write_images(tmp_path / "images")
    return tmp_path


def train(folder: Path, name: str, kind: str, *options: str, **changes: Any) -> Any:
    source = folder / kind
    if not source.exists():
        write_tiny_model(source, kind)
    config = write_config(folder, tiny_config(name, source, folder / "images", **changes))
    return fit(["fit", "--config", config, *options])


@pytest.mark.parametrize(("name", "kind"), [("sd15_full.yaml", "sd15"), ("sd21_v.yaml", "sd21")])
def test_a_config_trains_a_small_model(name: str, kind: str, here: Path) -> None:
    run = train(here, name, kind)
    log = Path(run.trainer.log_dir) / "metrics.csv"
    assert [step for step, _ in read_metric(log, "train/loss")] == [0, 1, 2, 3]
    assert len(read_metric(log, "val/loss")) == 2
    assert all(rate > 0 for _, rate in read_metric(log, "speed/images_per_s"))
    assert all(steps >= 1 for _, steps in read_metric(log, "plan/steps"))
    assert sorted(file.name for file in (here / "samples").iterdir()) == ["step2.png", "step4.png"]
    checkpoint = read_checkpoint(here / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert set(checkpoint["state_dict"]) == trained_names(run.model)
    before_the_end = read_checkpoint(here / "checkpoints" / "previous.ckpt")
    average, current = before_the_end["state_dict"], before_the_end["current_model_state"]
    assert any(not torch.equal(average[name], current[name]) for name in average)
