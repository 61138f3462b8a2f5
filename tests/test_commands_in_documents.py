"""Every command in README.md and docs/ runs as it is written, on networks and works that take seconds.

In a folder of its own each page's commands run from top to bottom: `configs/digits.yaml` and `configs/sd15_lora.yaml`
are there with small networks and few steps, and `slicemod bench` finds small works under the names that it knows.
`tests/training/test_fine_tuning_guide.py` runs those of the guide to fine-tuning; its commands for several devices are
parsed here, and `tests/training/test_distributed.py` trains on two processes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from slicemod.bench import bench_command, bench_options
from slicemod.bench.work import Work
from slicemod.bench.workloads import LayerWork
from slicemod.cli import main
from slicemod.kernels.native.build import native_obstacle
from tests.bench.tiny import measure_little
from tests.documents import PAGES, ROOT, commands
from tests.integrations import program_folders
from tests.training import tiny_stable_diffusion
from tests.training.tiny import tiny_config

SMALL = LayerWork("small", 64, 1, 67, 26, 2, 13)


def here(page: Path) -> dict[str, list[str]]:
    """The commands of a page by the program that they call."""
    found: dict[str, list[str]] = {}
    for command in commands(page):
        found.setdefault(shlex.split(command)[0], []).append(command)
    return found


FOR_SEVERAL_DEVICES = [
    command for command in commands(ROOT / "docs" / "fine-tuning.md") if "--trainer.devices" in command
]


def test_commands_are_found() -> None:
    assert {shlex.split(command)[0] for command in FOR_SEVERAL_DEVICES} == {"slicemod", "torchrun", "srun"}
    assert len(here(ROOT / "README.md")["slicemod"]) >= 6
    assert "slicemod plan sdxl --resolution 1024 --memory 24GiB --train" in commands(ROOT / "docs/planning.md")
    assert "slicemod bench --quick" in commands(ROOT / "README.md")
    assert set(here(ROOT / "docs" / "install.md")) == {"make", "pip"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_only_programs_that_are_tested_are_named(page: Path) -> None:
    assert set(here(page)) <= {"slicemod", "make", "pip", "torchrun", "srun"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "slicemod" in here(page) and page.name != "fine-tuning.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_slicemod_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_works(names: list[str], sizes: list[int], **more: Any) -> list[Work]:
        return [SMALL]

    monkeypatch.setattr(bench_command, "find_works", small_works)
    monkeypatch.setattr(bench_options, "GROWTH_TOKENS", (61, 127))
    measure_little(monkeypatch)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "digits.yaml").write_text(yaml.safe_dump(tiny_config()))
    monkeypatch.setattr(
        "slicemod.training.stable_diffusion.lightning_module.load_text_encoders", tiny_stable_diffusion.letter_encoders
    )
    content = tiny_stable_diffusion.tiny_config(
        "sd15_lora.yaml",
        tiny_stable_diffusion.write_tiny_model(tmp_path / "sd15", "sd15"),
        tiny_stable_diffusion.write_images(tmp_path / "photos"),
        trainer={"max_steps": 2},
    )
    del content["trainer"]["callbacks"][0]["init_args"]["dirpath"]  # the run's own
    content["run"] = "sd15_lora"
    (tmp_path / "configs" / "sd15_lora.yaml").write_text(yaml.safe_dump(content))
    program_folders.comfyui(tmp_path / "ComfyUI")
    program_folders.webui(tmp_path / "stable-diffusion-webui")
    monkeypatch.chdir(tmp_path)
    for command in here(page)["slicemod"]:
        if command == "slicemod kernels --build" and native_obstacle() is not None:
            continue
        assert main(shlex.split(command)[1:]) == 0, command


@pytest.mark.parametrize("command", FOR_SEVERAL_DEVICES)
def test_commands_for_several_devices_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, _, options = command.partition(" fit ")
    with pytest.raises(SystemExit) as ended:
        main(["fit", *shlex.split(options), "--print_config"])
    assert ended.value.code in (0, None)


@pytest.mark.parametrize("page", [page for page in PAGES if "make" in here(page)], ids=lambda page: page.name)
def test_make_commands_have_their_targets(page: Path) -> None:
    for command in here(page)["make"]:
        subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True, env=os.environ)


@pytest.mark.parametrize("page", [page for page in PAGES if "pip" in here(page)], ids=lambda page: page.name)
def test_pip_commands_name_extras_that_exist(page: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in here(page)["pip"]:
        *_, target = shlex.split(command)
        assert target == "." or target.removeprefix(".[").removesuffix("]") in extras, command
