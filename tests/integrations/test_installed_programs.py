"""In the programs themselves, where the environment says where they are.

`COMFYUI`, `WEBUI` and `FORGE` name their folders. `COMFYUI_PYTHON` and so on name the Python that each runs in; this
one when left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(program: str, *arguments: str) -> str:
    """Runs a file of this folder in a program's Python, which finds this clone; what it printed."""
    folder = os.environ.get(program)
    if folder is None:
        pytest.skip(f"the environment variable {program} names no folder of it")
    python = os.environ.get(f"{program}_PYTHON", sys.executable)
    module = f"tests.integrations.run_in_{program.lower()}"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [python, "-m", module, folder, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.parametrize("flags", [["--use-pytorch-cross-attention"], ["--use-split-cross-attention"], []], ids=str)
def test_models_of_comfyui_compute_what_its_own_attention_computes(flags: list[str]) -> None:
    printed = run("COMFYUI", *flags)
    assert {line.split()[0] for line in printed.splitlines() if " against " in line} == {
        "unet",
        "flux",
        "wan",
        "qwen",
        "sd3",
    }


def test_the_webuis_unet_and_vae_compute_what_its_own_optimizations_compute() -> None:
    printed = run("WEBUI")
    assert "undone" in printed
    assert printed.count(" with hypernetworks: ") == printed.count(" without hypernetworks: ") >= 5


def test_models_of_forge_compute_what_its_own_attention_computes() -> None:
    printed = run("FORGE")
    assert {line.split()[0] for line in printed.splitlines() if " against " in line} == {
        "unet",
        "flux",
        "chroma",
        "vae",
    }
