from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from PIL import Image

from slicemod import NotEnoughMemoryError
from slicemod.cli import BAD_INPUT, COMMANDS, main
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.planning import plan_options
from slicemod.planning.picture_kind import Offload
from slicemod.planning.transformers import NAMED_TRANSFORMERS
from slicemod.planning.unets import NAMED_UNETS
from slicemod.training.commands import sample_options
from slicemod.training.commands.fit_command import TASKS
from slicemod.training.stable_diffusion.samplers import SAMPLERS
from tests.training.tiny import tiny_config, train_tiny, write_config

ROOT = str(Path(__file__).parents[1])


class Intruder:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch intruded",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run, swapped attention, and files that are not what they say."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        checkpoint = train_tiny(folder)
    checkpoint.rename(folder / "good.ckpt")
    checkpoint.with_name("previous.ckpt").unlink()
    whole = (folder / "good.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Intruder()}))
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, folder / "other.ckpt")
    good = torch.load(folder / "good.ckpt", weights_only=True)
    torch.save({key: good[key] for key in ("state_dict", "slicemod_components")}, folder / "weights.ckpt")
    torch.save({key: value for key, value in good.items() if key != "slicemod_components"}, folder / "foreign.ckpt")
    (folder / "file").write_text("")
    return folder


@pytest.fixture
def here(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``run`` as the current folder."""
    monkeypatch.chdir(run)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """Runs a command that must fail: its one paragraph, after checking that nothing was written or overwritten."""
    before = contents(folder)
    assert main(arguments) == BAD_INPUT
    assert contents(folder) == before
    paragraph = capsys.readouterr().err.strip().splitlines()[-1]
    assert paragraph.startswith(f"slicemod {arguments[0]}: ")
    assert "Traceback" not in paragraph
    return paragraph


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}" in listed for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: slicemod {command}" in capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_a_task_lists_its_own_options(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--task", task, "--help"])
    assert stop.value.code == 0
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_fit_without_arguments_names_the_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paragraph = refused(capsys, tmp_path, "fit")
    assert all(task in paragraph for task in TASKS)
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    help_text = capsys.readouterr().out
    assert all(task in help_text for task in TASKS)


def test_help_of_every_command_is_there_without_pytorch() -> None:
    code = """
import contextlib, sys
from slicemod.cli import COMMANDS, main
main(["--help"])
main(["--version"])
for command in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
heavy = {"torch", "numpy", "lightning", "diffusers", "jsonargparse", "rich"} & sys.modules.keys()
sys.exit(", ".join(heavy) or None)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ROOT})


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "lines"), [(Terminal, 2), (io.StringIO, 1)])
def test_a_terminal_is_told_that_pytorch_is_loading(
    stream: type[io.StringIO], lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "plan", COMMANDS["plan"]._replace(module="a_package_that_is_missing"))
    errors = stream()
    with contextlib.redirect_stderr(errors):
        assert main(["plan", "sd15"]) == BAD_INPUT
    said = errors.getvalue().splitlines()
    assert len(said) == lines
    assert ("loading PyTorch" in said[0]) == (lines == 2)
    assert "needs the package a_package_that_is_missing" in said[-1]


@pytest.mark.slow
def test_a_package_that_a_command_misses_when_it_runs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "slicemod.planning.picture_plot", None)
    with pytest.raises(ModuleNotFoundError):  # a fault of ours
        main(["plan", "sd15-top", "--plot", str(tmp_path / "plan.png")])
    monkeypatch.delitem(sys.modules, "slicemod.planning.picture_plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    said = refused(capsys, tmp_path, "plan", "sd15-top", "--plot", str(tmp_path / "plan.png"))
    assert "needs the package matplotlib" in said


def test_the_names_that_options_list_are_those_there_are() -> None:
    assert set(plan_options.UNETS) == set(NAMED_UNETS)
    assert set(plan_options.TRANSFORMERS) == set(NAMED_TRANSFORMERS)
    assert set(plan_options.POLICIES) == set(POLICIES)
    assert set(plan_options.OFFLOADS) == set(get_args(Offload))
    assert set(sample_options.SAMPLERS) == set(SAMPLERS)


def test_a_lack_of_memory_is_one_paragraph_and_other_faults_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(error: Exception) -> None:
        def run(_arguments: object) -> int:
            raise error

        monkeypatch.setattr("slicemod.planning.plan_command.run", run)

    fail(NotEnoughMemoryError("budget: too small"))
    assert refused(capsys, tmp_path, "plan", "sd15") == "slicemod plan: budget: too small"
    fail(RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["plan", "sd15"])


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "'fitt'" in refused(capsys, tmp_path, "fitt")


def test_the_command_runs_as_a_module_without_loading_training_code() -> None:
    code = "import sys, slicemod.cli; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'diffusers')))"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ROOT})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data.colour", "3"], "colour"),
        pytest.param(["--data.batch_size", "many"], "batch_size", marks=pytest.mark.slow),
        (["--data.batch_size", "0"], "batch_size"),
        (["--data.image_size", "48"], "image_size"),
        (["--model.unet.class_path", "diffusers.UNet9DModel"], "UNet9DModel"),
        pytest.param(["--model.unet.class_path", "torch.nn.Linear"], "torch.nn.Linear", marks=pytest.mark.slow),
        (["--model.unet.norm_num_groups", "3"], "num_groups"),
        (["--model.optimizer.class_path", "torch.optim.Nothing"], "Nothing"),
        (["--attention.budget", "a lot"], "a lot"),
        pytest.param(["--attention.policy", "best"], "best", marks=pytest.mark.slow),
        (["--attention.colour", "3"], "attention: expected null or a block with keys out of budget"),
        (["--autoencoder_training.max_steps", "0"], "max_steps"),
        (["--trainer.max_steps", "1.5"], "max_steps"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--model.init_from", "cut.ckpt"], "cut.ckpt"),
        (["--model.init_from", "evil.ckpt"], "evil.ckpt"),
        pytest.param(["--model.init_from", "other.ckpt"], "other.ckpt", marks=pytest.mark.slow),
        (["--model.init_from", "missing.ckpt"], "missing.ckpt"),
        pytest.param(["--ckpt_path", "cut.ckpt"], "cut.ckpt", marks=pytest.mark.slow),
        pytest.param(["--ckpt_path", "evil.ckpt"], "evil.ckpt", marks=pytest.mark.slow),
        (["--ckpt_path", "other.ckpt"], "other.ckpt"),
        pytest.param(["--ckpt_path", "missing.ckpt"], "missing.ckpt", marks=pytest.mark.slow),
        (["--ckpt_path", "weights.ckpt"], "weights.ckpt is no checkpoint to continue from"),
        (["--ckpt_path", "foreign.ckpt"], "foreign.ckpt is no checkpoint of `slicemod fit`"),
        (["--seed_everything", "-5"], "seed_everything"),
        (["--ckpt_path", "last"], "--ckpt_path last finds no checkpoint"),
        (["--autoencoder_training.weights", "file/weights.safetensors"], "file"),
    ],
    ids=" ".join,
)
def test_fit_names_what_it_cannot_use(
    options: list[str], named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(here, tiny_config())
    assert named in refused(capsys, here, "fit", "--config", config, *options)
    assert not (here / "intruded").exists()


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("attention", {"budget": "64MiB", "polcy": "exact"}, "polcy"),
        ("colour", 3, "colour"),
        ("model", "a string", "model"),
        ("attention", {"budget": "64 parsecs"}, "64 parsecs"),
    ],
)
def test_a_yaml_file_that_is_wrong_is_named(
    place: str, value: object, named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = tiny_config() | {place: value}
    assert named in refused(capsys, here, "fit", "--config", write_config(here, config))


def test_a_file_that_is_no_yaml_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken.yaml").write_text("data: [1, 2")
    assert "broken.yaml" in refused(capsys, here, "fit", "--config", "broken.yaml")


def test_folders_that_cannot_be_written_are_named_before_training(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    config["trainer"]["callbacks"][0]["init_args"]["dirpath"] = "file/checkpoints"
    assert "file/checkpoints" in refused(capsys, here, "fit", "--config", write_config(here, config))


def test_an_autoencoder_that_does_not_fit_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "cut.safetensors").write_bytes((here / "runs/digits/autoencoder.safetensors").read_bytes()[:900])
    for weights in ("cut.safetensors", "file"):
        options = ["--autoencoder_training.weights", weights]
        config = write_config(here, tiny_config())
        assert weights in refused(capsys, here, "fit", "--config", config, *options)


def test_validate_measures_a_checkpoint_and_needs_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(here, tiny_config())
    assert "--ckpt_path is missing" in refused(capsys, here, "validate", "--config", config)
    assert main(["validate", "--config", config, "--ckpt_path", "good.ckpt"]) == 0
    assert "val/psnr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"--class": "10"}, "from 0 to 9, got 10"),
        ({"--class": "-1"}, "got -1"),
        ({"--class": "seven"}, "seven"),
        ({"--checkpoint": "cut.ckpt"}, "cut.ckpt"),
        ({"--checkpoint": "evil.ckpt"}, "evil.ckpt"),
        ({"--checkpoint": "other.ckpt"}, "other.ckpt"),
        ({"--checkpoint": "missing.ckpt"}, "missing.ckpt"),
        ({"--out": "seven.txt"}, "seven.txt"),
        ({"--out": "file/seven.png"}, "file"),
        ({"--count": "0"}, "--count"),
        ({"--resolution": "33"}, "33"),
        ({"--steps": "0"}, "steps"),
        ({"--colour": "red"}, "--colour"),
    ],
    ids=str,
)
def test_sample_names_what_it_cannot_use(
    options: dict[str, str], named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"--checkpoint": "good.ckpt", "--class": "7", "--out": "seven.png", "--steps": "2"}
    arguments = [word for pair in (good | options).items() for word in pair]
    assert named in refused(capsys, here, "sample", *arguments)


@pytest.mark.parametrize(
    ("resolution", "edge"), [([], 32), (["--resolution", "64"], 64), (["--resolution", "128"], 128)]
)
def test_sample_writes_a_picture_at_one_two_and_four_times_the_trained_resolution(
    resolution: list[str], edge: int, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "seven.png"
    options = ["--checkpoint", "good.ckpt", "--class", "7", "--count", "4", "--steps", "5", "--out", str(out)]
    assert main(["sample", *options, *resolution]) == 0
    with Image.open(out) as picture:
        assert picture.size == (2 * edge + 2, 2 * edge + 2)


def test_export_writes_diffusers_folders_into_an_empty_folder(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert main(["export", "--checkpoint", "good.ckpt", "--out", str(out)]) == 0
    saved = {str(file.relative_to(out)) for file in out.rglob("*.*")}
    assert {"unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"} <= saved
    assert {"unet/diffusion_pytorch_model.safetensors", "class_embedder.safetensors"} <= saved
    assert json.loads((out / "vae" / "config.json").read_text())["scaling_factor"] != 0.18215
    assert "missing or empty" in refused(capsys, out, "export", "--checkpoint", "good.ckpt", "--out", str(out))


def test_the_saved_config_is_resolved_and_can_be_used_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = here / "runs" / "digits" / "csv" / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["attention"]["kernel"] == "auto"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(saved), "--print_config"])
    assert stop.value.code == 0
