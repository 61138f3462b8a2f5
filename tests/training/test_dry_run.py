from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slicemod.training.dry_run import forecast, state_bytes
from slicemod.training.fit_command import fit
from slicemod.training.step_meter import current_plans
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    write_config,
    write_images,
    write_tiny_model,
)


def test_a_dry_run_tells_the_plans_that_training_takes_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slicemod.training.stable_diffusion.load_text_encoders", letter_encoders)
    content = tiny_config(
        "sd15_full.yaml",
        write_tiny_model(tmp_path / "sd15", "sd15"),
        write_images(tmp_path / "images"),
        data={"batch_size": 1},
        trainer={"max_steps": 1},
    )
    content["attention"]["budget"] = "60KiB"
    config = write_config(tmp_path, content)
    before = sorted(tmp_path.rglob("*"))
    fit(["fit", "--config", config, "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr().out
    assert "Nothing was trained" in told

    run = fit(["fit", "--config", config])
    (batch,) = [batch for batch in run.datamodule.train_dataloader() if batch["number"] == 0]
    latents = batch["mean"].shape[2:]
    forecasts = forecast(run.model, run.datamodule, torch.device("cpu"), 4)
    assert all(str(row.bucket) in told for row in forecasts)
    assert sum(row.images for row in forecasts) == len(run.datamodule.train_images)
    (row,) = [row for row in forecasts if (row.bucket.height // 2, row.bucket.width // 2) == latents]
    taken = current_plans(run.model.swap_report).values()
    wanted = {(plan.axis, plan.steps, plan.slice_size) for _, shape, plan in row.plans if shape.queries == shape.keys}
    assert any(plan.steps > 1 for plan in taken)
    assert wanted <= {(plan.axis, plan.steps, plan.slice_size) for plan in taken}


def test_state_bytes_count_weights_gradients_and_the_optimizer() -> None:
    module = torch.nn.Linear(13, 7)
    numbers = 13 * 7 + 7
    assert state_bytes(module, torch.optim.AdamW) == numbers * 4 * 4
    assert state_bytes(module, torch.optim.SGD) == numbers * 4 * 2
    module.bias.requires_grad_(False)
    assert state_bytes(module, torch.optim.AdamW) == (numbers + 3 * 13 * 7) * 4
