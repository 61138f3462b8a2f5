from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import read_checkpoint, read_safetensors
from slicemod.training.common.pictures import read_metric
from slicemod.training.digits.latent_diffusion import LatentDiffusion
from slicemod.user_error import UserError
from tests.training.tiny import CONFIGS, STEPS, newest_checkpoint, tiny_config, train_tiny, write_config

PATIENCE = 120  # seconds for a subprocess to import everything on a busy machine


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(checkpoint)["state_dict"])


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", ["digits.yaml", "digits_finetune.yaml", "digits_lora.yaml"])
def test_every_shipped_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = ["--config", str(CONFIGS / name)] if name != "digits.yaml" else []
    with pytest.raises(SystemExit) as stop:
        fit(["fit", "--config", str(CONFIGS / "digits.yaml"), *overlay, "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["attention"] | {"budget": "64MiB", "policy": "exact"} == resolved["attention"]


@pytest.mark.parametrize(
    ("options", "budget"), [([], "64MiB"), (["--attention.budget", "32MiB"], "32MiB"), (["--attention", "null"], None)]
)
def test_attention_is_overridden_from_the_command_line(
    options: list[str], budget: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fit(["fit", "--config", str(CONFIGS / "digits.yaml"), *options, "--print_config"])
    attention = yaml.safe_load(capsys.readouterr().out)["attention"]
    assert attention is None if budget is None else attention["budget"] == budget


def test_fit_in_an_empty_folder_trains_the_autoencoder_and_writes_logs_and_checkpoints(base_run: Path) -> None:
    run = base_run / "runs" / "digits"
    _, metadata = read_safetensors(run / "autoencoder.safetensors")
    assert float(metadata["psnr"]) > 0
    assert float(metadata["scaling_factor"]) > 0
    log = run / "csv" / "version_0" / "metrics.csv"
    assert [step for step, _ in read_metric(log, "train/loss")] == list(range(STEPS))
    for name in ("val/loss", "val/psnr", "val/ssim"):
        assert read_metric(log, name)
    assert (run / "csv" / "version_0" / "config.yaml").is_file()
    assert list((run / "tensorboard" / "version_0").glob("events.*"))
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == STEPS


def test_later_fits_reuse_the_autoencoder_and_overwrite_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = train_tiny(tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    with pytest.raises(UserError, match=r"last\.ckpt of an earlier run.*--ckpt_path last.*--run NAME"):
        train_tiny(tmp_path)
    train_tiny(tmp_path, "--run", "second")
    said = capsys.readouterr().out
    assert "training the autoencoder first" not in said
    second = tmp_path / "runs" / "second" / "checkpoints" / "last.ckpt"
    assert f"run second: {STEPS} steps done" in said
    for written in ("checkpoints/last.ckpt", "csv/version_0", "tensorboard/version_0"):
        assert f" runs/second/{written}\n" in said
    assert all(file.read_bytes() == content for file, content in files.items())
    assert_same(weights(first), weights(second))


def test_finetuning_starts_from_the_base_checkpoint(
    base_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.init_from", str(base_checkpoint), "--model.optimizer.init_args.lr", "0.0"]
    tuned = train_tiny(tmp_path, *options, lr_scheduler=None)
    assert_same(weights(tuned), weights(base_checkpoint))  # a rate of zero leaves what was loaded


def test_a_run_continued_from_an_interruption_ends_where_an_uninterrupted_one_does(
    base_run: Path, base_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    weights_file = Path("runs/digits/autoencoder.safetensors")
    weights_file.write_bytes((base_run / weights_file).read_bytes())
    train_tiny(tmp_path, "--attention", "null", "--trainer.max_steps", "2")
    assert read_checkpoint(newest_checkpoint(tmp_path))["global_step"] == 2
    continued = train_tiny(tmp_path, "--attention", "null", "--ckpt_path", "last")
    assert read_checkpoint(continued)["global_step"] == STEPS
    assert_same(weights(continued), weights(base_checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_last_continues_from(
    signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, tiny_config() | {"attention": None})
    command = [sys.executable, "-m", "slicemod.cli", "fit", "--config", config]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    checkpoints = tmp_path / "runs" / "digits" / "checkpoints"
    endless = subprocess.Popen(
        [*command, "--trainer.max_steps", "450"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + PATIENCE
    while not list(checkpoints.glob("last*.ckpt")):  # training runs once validation has written one
        assert endless.poll() is None, endless.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)
    endless.send_signal(signum)
    _, errors = endless.communicate(timeout=PATIENCE)
    assert endless.returncode == 128 + signum
    paragraph = errors.strip().splitlines()[-1]
    assert f"stopped by {signum.name} after step" in paragraph
    assert "Traceback" not in errors
    assert f"slicemod fit --config {config} --trainer.max_steps 450 --ckpt_path last" in paragraph
    step = read_checkpoint(newest_checkpoint(tmp_path))["global_step"]
    assert f"after step {step}." in paragraph
    monkeypatch.chdir(tmp_path)
    fit(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", str(step + 2)])
    assert read_checkpoint(newest_checkpoint(tmp_path))["global_step"] == step + 2


def test_a_schedule_shorter_than_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="total_steps must be at least the run's 801 steps, got 800"):
        train_tiny(tmp_path, "--trainer.max_steps", "801")


def test_a_swapped_run_keeps_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny_config())
    model = fit(["fit", "--config", config, "--trainer.max_steps", "1"]).model
    assert isinstance(model, LatentDiffusion)
    assert model.swap_report is not None
    assert all(layer.plan is not None for layer in model.swap_report.layers)


@pytest.mark.slow
def test_a_run_prints_nothing_of_lightnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    config["trainer"]["enable_model_summary"] = False
    ran = subprocess.run(
        [sys.executable, "-m", "slicemod.cli", "fit", "--config", write_config(tmp_path, config)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    assert ran.stderr == ""
    assert ran.stdout.splitlines()[-1].startswith("  logs ")
    assert not re.search("Tip|GPU|TPU|Seed set|stopped", ran.stdout)
