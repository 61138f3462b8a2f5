"""A run that is killed, runs out of room or of finite numbers, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from slicemod.cli import main
from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import read_checkpoint
from slicemod.training.stable_diffusion.frozen_stages import FrozenStages
from slicemod.training.stable_diffusion.lightning_module import StableDiffusion
from slicemod.training.stable_diffusion.nonfinite import NonFiniteError
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    write_config,
    write_images,
    write_tiny_model,
)

ROOT = Path(__file__).parents[3]
ENCODERS = "slicemod.training.stable_diffusion.lightning_module.load_text_encoders"
PATIENCE = 120  # seconds for a subprocess to import everything on a busy machine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration with everything that has a state: averages, accumulation, a schedule, crops and flips."""
    folder = tmp_path_factory.mktemp("survival")
    content = tiny_config(
        "sd15_full.yaml",
        write_tiny_model(folder / "sd15", "sd15"),
        write_images(folder / "images"),
        data={"crops": 2, "flip": True, "batch_size": 1},
        trainer={"max_steps": 5, "accumulate_grad_batches": 2, "val_check_interval": 3},
    )
    return write_config(folder, content)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ENCODERS, letter_encoders)


def fitted(folder: Path, config: str, *options: str) -> Path:
    """The folder, with a run of the configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ENCODERS, letter_encoders)
        fit(["fit", "--config", config, *options])
    return folder


@pytest.fixture(scope="module")
def uninterrupted(config: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last state of a run that nothing stopped."""
    return final_state(fitted(tmp_path_factory.mktemp("whole"), config))


@pytest.fixture(scope="module")
def one_step(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one step."""
    return fitted(tmp_path_factory.mktemp("one"), config, "--trainer.max_steps", "1") / "checkpoints" / "last.ckpt"


def run(folder: Path, config: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    """The configuration as a process of its own in ``folder``."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.run_with_letters", "fit", "--config", config, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def final_state(folder: Path) -> dict[str, Any]:
    """What a run's last checkpoint holds of weights, average, optimizer, schedule and position."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
    state = {name: checkpoint[name] for name in (*kept, "epoch") if name in checkpoint}
    return state | {"position": checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]}


def assert_identical(first: Any, second: Any, place: str = "") -> None:
    """Bit by bit."""
    if isinstance(first, Mapping):
        assert first.keys() == second.keys(), place
        for name in first:
            assert_identical(first[name], second[name], f"{place}.{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_identical(*pair, f"{place}.{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


@pytest.mark.slow
@pytest.mark.parametrize(
    "death",
    [
        {"KILL_AT": "7"},  # in the middle of step 3's accumulation, after the checkpoint of step 2
        {"KILL_AT": "4"},  # at the start of an epoch, after a whole step
        {"KILL_AT": "9"},
        {"KILL_WHILE_SAVING": "2"},
    ],
    ids=str,
)
def test_a_killed_run_continues_to_bit_identical_weights(
    death: dict[str, str], config: str, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = run(tmp_path / "killed", config, **death)
    killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    if "KILL_WHILE_SAVING" in death:
        assert list((tmp_path / "killed" / "checkpoints").glob(".last*"))
    monkeypatch.chdir(tmp_path / "killed")
    fit(["fit", "--config", config, "--ckpt_path", "last"])
    assert_identical(final_state(tmp_path / "killed"), uninterrupted)
    assert sorted(file.name for file in (tmp_path / "killed" / "checkpoints").iterdir()) == [
        "last.ckpt",
        "previous.ckpt",
    ]


class FailOnce(Callback):
    """Raises an exception in the n-th batch, from 0 on."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.seen == self.at:
            raise RuntimeError("out of luck")
        self.seen += 1


@pytest.mark.parametrize(
    "at",  # at the start of an epoch, halfway through a step, between two steps
    [pytest.param(4, marks=pytest.mark.slow), 5, pytest.param(6, marks=pytest.mark.slow)],
)
def test_a_run_that_failed_repeats_the_batches_of_the_step_that_was_not_done(
    at: int, config: str, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failed").mkdir()
    monkeypatch.chdir(tmp_path / "failed")
    fail = f'{{"class_path": "{__name__}.FailOnce", "init_args": {{"at": {at}}}}}'
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(["fit", "--config", config, "--trainer.callbacks+", fail])
    assert read_checkpoint(tmp_path / "failed" / "checkpoints" / "last.ckpt")["global_step"] == at // 2
    fit(["fit", "--config", config, "--ckpt_path", "last"])
    assert_identical(final_state(tmp_path / "failed"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_the_run_continues_to_bit_identical_weights(
    signum: signal.Signals,
    config: str,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "stopped"
    stopped = run(folder, config, "--trainer.max_steps", "5")
    limit = time.monotonic() + PATIENCE
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    stopped.send_signal(signum)
    _, errors = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode in (128 + signum, 0), errors  # 0 where it was done first
    monkeypatch.chdir(folder)
    fit(["fit", "--config", config, "--ckpt_path", "last"])
    assert_identical(final_state(folder), uninterrupted)


class Spoil(Callback):
    """Makes a weight no number before a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            with torch.no_grad():
                pl_module.unet.conv_in.weight[0, 0, 0, 0] = float("nan")


def test_a_loss_that_is_no_number_stops_with_step_files_and_the_last_good_checkpoint(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil = f'{{"class_path": "{__name__}.Spoil"}}'
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan in step 3, whose batch holds .*images/.*last\.ckpt"
    ) as stop:
        fit(["fit", "--config", config, "--trainer.callbacks+", spoil])
    assert stop.value.step == 3
    assert stop.value.checkpoint is not None
    good = read_checkpoint(stop.value.checkpoint)
    assert good["global_step"] == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in good["current_model_state"].values())


def test_gradients_that_are_no_numbers_stop_before_they_reach_the_weights(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = StableDiffusion.denoising_losses

    def explode(self: StableDiffusion, batch: Any, timesteps: Any = None) -> torch.Tensor:
        loss = losses(self, batch, timesteps)
        if self.global_step == 1 and loss.requires_grad:
            return loss + (loss - loss.detach()).abs().sqrt()  # adds zero, with an infinite slope
        return loss

    monkeypatch.setattr(StableDiffusion, "denoising_losses", explode)
    with pytest.raises(NonFiniteError, match=r"norm of the gradients is (nan|inf) in step 1"):
        fit(["fit", "--config", config])


def test_a_cut_checkpoint_is_named_and_the_one_before_is_taken(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(["fit", "--config", config, "--trainer.max_steps", "4"])
    last = tmp_path / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    before = read_checkpoint(tmp_path / "checkpoints" / "previous.ckpt")["global_step"]
    capsys.readouterr()
    fit(["fit", "--config", config, "--ckpt_path", "last"])
    said = capsys.readouterr()
    assert "last.ckpt cannot be read as a checkpoint" in said.err
    assert f"previous.ckpt, the newest of its folder, after step {before}" in said.out
    assert read_checkpoint(last)["global_step"] == 5


def spoil(path: Path, spoilt: Path) -> None:
    """Writes a checkpoint with one weight that is no number."""
    content = read_checkpoint(path)
    first = next(iter(content["state_dict"].values()))
    first.view(-1)[0] = float("nan")
    torch.save(content, spoilt)


def test_a_last_checkpoint_that_holds_no_numbers_is_named_and_the_one_before_is_taken(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(["fit", "--config", config, "--trainer.max_steps", "4"])
    checkpoints = tmp_path / "checkpoints"
    spoil(checkpoints / "last.ckpt", checkpoints / "last.ckpt")
    fit(["fit", "--config", config, "--ckpt_path", "last"])
    assert "last.ckpt holds values that are no finite numbers (nan or inf) in 1 of" in capsys.readouterr().err
    assert read_checkpoint(checkpoints / "last.ckpt")["global_step"] == 5


@pytest.mark.parametrize(
    "command",
    [
        "fit --config {config} --ckpt_path",
        "sample --prompt cat --out cat.png --checkpoint",
        pytest.param("export --out all --checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_that_holds_no_numbers_is_refused(
    command: str, config: str, one_step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(one_step, tmp_path / "spoilt.ckpt")
    assert main([*command.format(config=config).split(), "spoilt.ckpt"]) == 2
    assert "holds values that are no finite numbers" in capsys.readouterr().err


def test_an_optimizer_that_holds_no_numbers_is_refused(config: str, one_step: Path, tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    content = read_checkpoint(one_step)
    content["optimizer_states"][0]["state"][3]["exp_avg"].fill_(float("inf"))
    torch.save(content, last)
    with pytest.raises(UserError, match=r"no finite numbers .* exp_avg of weight 3"):
        fit(["fit", "--config", config, "--ckpt_path", str(last)])


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_while_latents_are_cached_says_that_they_are_kept(
    signum: signal.Signals,
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode, encoded = FrozenStages.encode_images, []

    def stopped(self: FrozenStages, images: torch.Tensor) -> Any:
        encoded.append(images)
        if len(encoded) == 3:
            os.kill(os.getpid(), signum)
        return encode(self, images)

    monkeypatch.setattr(FrozenStages, "encode_images", stopped)
    before = signal.signal(signum, signal.default_int_handler)  # a shell may have it ignored, in the background
    assert main(["fit", "--config", config]) == 128 + signum
    said = capsys.readouterr().err
    assert f"slicemod fit: stopped by {signum.name} before the first step. Latents and embeddings cached so far" in said
    assert "are kept in cache" in said
    assert signal.signal(signum, before) is signal.default_int_handler
    assert main(["fit", "--config", config]) == 0
    captions = 5 + 1  # of the images, and the empty one
    latents = len(list((tmp_path / "cache").rglob("*.safetensors"))) - captions
    assert len(encoded) == latents + 1  # the third was begun twice, no other


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save
    full = OSError(28, "No space left on device")

    def fails_later(content: Any, path: Any, **options: Any) -> None:
        save(content, path, **options)
        if content["global_step"] == 4:
            raise full

    monkeypatch.setattr("slicemod.training.common.whole_checkpoint_io.torch.save", fails_later)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written: .*No space left"):
        fit(["fit", "--config", config])
    files = [file.name for file in (tmp_path / "checkpoints").iterdir()]
    assert files == ["last.ckpt"]
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
