from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from slicemod import SlicePlan
from slicemod.bench.memory import peak_memory
from slicemod.training.commands.fit_command import fit
from slicemod.training.common.step_meter import current_plans
from slicemod.training.stable_diffusion.dry_run import forecast, optimizer_bytes
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    write_config,
    write_images,
    write_tiny_model,
)

NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")


@pytest.mark.slow
def test_a_dry_run_tells_the_plans_that_training_takes_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
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
    (batch,) = [batch for batch in run.datamodule.train_dataloader() if 0 in batch["numbers"]]
    latents = batch["mean"].shape[2:]
    forecasts = forecast(run.model, run.datamodule, run.trainer)
    assert all(str(row.bucket) in told for row in forecasts)
    assert sum(row.images for row in forecasts) == len(run.datamodule.train_images)
    (row,) = [row for row in forecasts if (row.bucket.height // 2, row.bucket.width // 2) == latents]
    taken = current_plans(run.model.swap_report).values()
    wanted = {
        (layer.plan.axis, layer.plan.steps, layer.plan.slice_size)
        for layer in row.layers
        if isinstance(layer.plan, SlicePlan) and layer.shape.queries == layer.shape.keys
    }
    assert any(plan.steps > 1 for plan in taken)
    assert wanted
    assert wanted <= {(plan.axis, plan.steps, plan.slice_size) for plan in taken}


@pytest.mark.parametrize(
    ("name", "precision", "blocks", "checkpoint", "accumulated"),
    [
        ("sd15_full.yaml", "32-true", False, True, 1),
        pytest.param("sd15_full.yaml", "32-true", False, "layer", 1, marks=pytest.mark.slow),
        pytest.param("sd15_full.yaml", "bf16-mixed", True, True, 2, marks=pytest.mark.slow),
        pytest.param("sd21_v.yaml", "bf16-mixed", False, True, 1, marks=pytest.mark.slow),
        pytest.param("sd15_lora.yaml", "bf16-mixed", False, True, 1, marks=(NEEDS_PEFT, pytest.mark.slow)),
    ],
)
def test_the_predicted_peak_is_that_of_a_step(
    name: str,
    precision: str,
    blocks: bool,
    checkpoint: bool | str,
    accumulated: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
    kind = name[:4]
    content = tiny_config(
        name,
        write_tiny_model(tmp_path / kind, kind, channels=(32, 64)),  # oneDNN pads fewer to 16
        write_images(tmp_path / "images"),
        model={"block_checkpointing": blocks},
        attention={"checkpoint": checkpoint},
        data={"resolution": 96, "max_ratio": 1.0, "val_count": 3},
        trainer={
            "max_steps": 1,
            "precision": precision,
            "accumulate_grad_batches": accumulated,
            "limit_val_batches": 0,
        },
    )
    run = fit(["fit", "--config", write_config(tmp_path, content)])
    (batch,) = run.datamodule.train_dataloader()
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        for _ in range(accumulated):
            with run.trainer.precision_plugin.forward_context():
                loss = run.model.denoising_losses(batch).mean()
            torch.autograd.backward(loss)

    step()
    (row,) = forecast(run.model, run.datamodule, run.trainer)
    measured = peak_memory(step)
    weights = sum(parameter.nbytes for parameter in run.model.unet.parameters())
    averages = name != "sd15_lora.yaml"
    predicted = row.peak.total - row.peak.optimizer - weights * (1 + averages)
    print(f"{name} {precision}: predicted {predicted:,}, measured {measured:,}, {predicted / measured:.3f}")
    assert predicted == pytest.approx(measured, rel=0.04)


def test_the_optimizers_state_is_that_of_what_is_trained() -> None:
    module = torch.nn.Linear(13, 7)
    assert optimizer_bytes(module, torch.optim.AdamW) == (13 * 7 + 7) * 4 * 2
    assert optimizer_bytes(module, torch.optim.SGD) == 0
    module.bias.requires_grad_(False)
    assert optimizer_bytes(module, torch.optim.AdamW) == 13 * 7 * 4 * 2


def test_longer_captions_are_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_tiny_model(tmp_path / "sd15", "sd15")
    images = write_images(tmp_path / "images")
    content = tiny_config("sd15_full.yaml", source, images, data={"max_ratio": 1.0}, model={"max_tokens": 225})
    fit(["fit", "--config", write_config(tmp_path, content), "--dry-run"])
    told = capsys.readouterr().out
    assert "x 231 x" in told  # three chunks of 77
    assert "x 77 x" not in told


def test_a_kernel_that_cannot_run_is_an_error_for_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_tiny_model(tmp_path / "sd15", "sd15")
    content = tiny_config("sd15_full.yaml", source, write_images(tmp_path / "images"), data={"max_ratio": 1.0})
    content["attention"]["kernel"] = "triton"
    with pytest.raises(UserError, match=r'kernel: expected .*"triton"; it runs on GPUs, .* Take kernel="auto"'):
        fit(["fit", "--config", write_config(tmp_path, content), "--dry-run"])
