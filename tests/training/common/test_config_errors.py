"""What `slicemod fit` says of a configuration that it cannot use: the place and the cause, not the parser's types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slicemod.cli import main
from slicemod.training.commands.fit_command import fit
from slicemod.user_error import UserError
from tests.training.tiny import tiny_config, write_config

Change = Callable[[dict[str, Any]], Any]


def refusal(folder: Path, change: Change, *options: str) -> str:
    config = tiny_config()
    change(config)
    with pytest.raises(UserError) as refused:
        fit(["fit", "--config", write_config(folder, config), *options])
    return str(refused.value)


CASES: dict[str, tuple[Change, list[str]]] = {
    "optimizer": (
        lambda c: c["model"]["optimizer"]["init_args"].update(lrr=1),
        [
            "model.optimizer.init_args: unknown key 'lrr' of torch.optim.AdamW: known are amsgrad, betas,",
            " lr, maximize",
        ],
    ),
    "schedule": (
        lambda c: c["model"]["lr_scheduler"]["init_args"].update(lrr=1),
        ["model.lr_scheduler.init_args: unknown key 'lrr' of torch.optim.lr_scheduler.OneCycleLR: known are", "max_lr"],
    ),
    "callback": (
        lambda c: c["trainer"]["callbacks"][1]["init_args"].update(lrr=1),
        [
            "trainer.callbacks[1].init_args: unknown key 'lrr' of",
            "callbacks.LearningRateMonitor: known are",
            "logging_interval",
        ],
    ),
    "beside": (
        lambda c: c["model"]["optimizer"].update(lr=1),
        ["model.optimizer: unknown key 'lr' beside class_path", "under init_args"],
    ),
    "class": (
        lambda c: c["model"]["optimizer"].update(class_path="torch.optim.AdamX"),
        ["model.optimizer.class_path: torch.optim.AdamX is not there"],
    ),
    "block": (lambda c: c["model"].update(lrr=1), ["model: unknown key 'lrr' of LatentDiffusion: known are attention"]),
    "value": (
        lambda c: c["model"]["optimizer"]["init_args"].update(lr="much"),
        ["model.optimizer: lr cannot be 'much': expected float or torch.Tensor"],
    ),
    "callback's value": (
        lambda c: c["trainer"]["callbacks"][0]["init_args"].update(every_n_train_steps="much"),
        ["trainer.callbacks: every_n_train_steps cannot be 'much': expected int"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_by_its_place_and_not_by_the_types_that_were_tried(name: str, tmp_path: Path) -> None:
    change, expected = CASES[name]
    said = refusal(tmp_path, change)
    assert all(part in said for part in expected), said
    assert "Subtypes" not in said
    assert "Union" not in said


def test_a_wrong_key_on_the_command_line_is_named_as_in_a_file(tmp_path: Path) -> None:
    for option in ("--model.optimizer.init_args.lrr=1", "--model.optimizer.lrr=1"):
        assert "unknown key 'lrr' of torch.optim.AdamW: known are" in refusal(tmp_path, lambda c: None, option)


NOT_FINITE: dict[str, Change] = {
    "model.lora.alpha": lambda c: c["model"].update(lora={"alpha": float("nan")}),
    "model.optimizer.init_args.lr": lambda c: c["model"]["optimizer"]["init_args"].update(lr=float("inf")),
    "model.optimizer.init_args.betas[1]": lambda c: c["model"]["optimizer"]["init_args"].update(
        betas=[0.9, float("nan")]
    ),
    "model.label_dropout": lambda c: c["model"].update(label_dropout=float("-inf")),
    "autoencoder_training.kl_weight": lambda c: c["autoencoder_training"].update(kl_weight=float("nan")),
    "trainer.gradient_clip_val": lambda c: c["trainer"].update(gradient_clip_val=float("nan")),
    "data.val_fraction": lambda c: c["data"].update(val_fraction=float("nan")),
}


@pytest.mark.parametrize("place", NOT_FINITE)
def test_a_number_that_is_not_finite_is_refused_by_its_place(place: str, tmp_path: Path) -> None:
    assert f"{place}: expected a finite number, got" in refusal(tmp_path, NOT_FINITE[place])


def test_negative_rates_are_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(tmp_path, lambda c: c["model"]["optimizer"]["init_args"].update(lr=-1.0))
    assert said == "model.optimizer cannot be built: Invalid learning rate: -1.0. Correct its init_args."
    said = refusal(tmp_path, lambda c: c["model"]["lr_scheduler"]["init_args"].update(max_lr=-1.0))
    assert "the learning rate must be a number from 0 on, got" in said
    assert "trainer.gradient_clip_val: expected a number from 0 on, got -2.5" in refusal(
        tmp_path, lambda c: c["trainer"].update(gradient_clip_val=-2.5)
    )
    assert not (tmp_path / "runs").exists()


def test_a_second_last_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(tmp_path, lambda c: c["trainer"]["callbacks"].append(c["trainer"]["callbacks"][0]))
    assert "trainer.callbacks: expected each callback that has a state once" in said
    assert "LastCheckpoint" in said


def test_a_key_that_is_given_twice_ends_the_command(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("task: digits\nmodel: {}\ntask: stable_diffusion\n")
    with pytest.raises(UserError, match=r"twice\.yaml: the key 'task' in line 3 was given in line 1"):
        fit(["fit", "--config", str(file)])
    part = tmp_path / "part.yaml"
    part.write_text("batch_size: 3\nbatch_size: 5\n")
    assert "the key 'batch_size' in line 2" in refusal(tmp_path, lambda c: None, "--data", str(part))


@pytest.mark.parametrize("options", [[], ["--trainer.max_steps", "3"]], ids=["nothing", "options alone"])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_without_a_configuration_the_tasks_are_shown(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *options]) == 2
    said = capsys.readouterr().err
    assert f"`slicemod {command} --config configs/sd15_lora.yaml --data.folder photos` (stable_diffusion)" in said
    assert f"`slicemod {command} --config configs/digits.yaml` (digits)" in said
