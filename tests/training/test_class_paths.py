"""The class paths in users' configs stay importable, wherever the classes live."""

from __future__ import annotations

import pickle
import re
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

ROOT = Path(__file__).parents[2]

# Every path that a shipped config or a page of the documentation has ever named, and where its class lives.
HOMES = {
    "slicemod.training.class_embedder.ClassEmbedder": "slicemod.training.digits.class_embedder",
    "slicemod.training.last_checkpoint.LastCheckpoint": "slicemod.training.common.last_checkpoint",
    "slicemod.training.optimizers.WarmUp": "slicemod.training.common.optimizers",
    "slicemod.training.sample_images.SampleImages": "slicemod.training.stable_diffusion.sample_images",
    "slicemod.training.sample_quality.SampleQuality": "slicemod.training.stable_diffusion.sample_quality",
    "slicemod.training.stable_diffusion.StableDiffusion": "slicemod.training.stable_diffusion.lightning_module",
    "slicemod.training.step_meter.StepMeter": "slicemod.training.common.step_meter",
    "slicemod.training.weight_average.WeightAverage": "slicemod.training.common.weight_average",
}


@pytest.mark.parametrize("path", HOMES)
def test_a_class_path_gives_the_class_of_its_home(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert getattr(import_module(module), name) is getattr(import_module(HOMES[path]), name)


@pytest.mark.parametrize("path", HOMES)
def test_a_pickle_that_names_a_class_by_its_path_loads(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert pickle.loads(f"c{module}\n{name}\n.".encode()) is getattr(import_module(HOMES[path]), name)


def test_the_parser_of_configs_takes_a_callback_by_its_path() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    path = "slicemod.training.step_meter.StepMeter"
    made = parser.instantiate(parser.parse_args(["--callback", path])).callback
    assert type(made) is import_module(HOMES[path]).StepMeter


def test_the_paths_are_all_that_configs_and_pages_name() -> None:
    pages = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    named = {name for page in pages for name in re.findall(r"slicemod\.training\.[\w.]*\w", page.read_text("utf-8"))}
    assert named <= set(HOMES)
    assert named


def test_a_folder_without_that_name_says_so() -> None:
    with pytest.raises(AttributeError, match=r"stable_diffusion.*'NoSuchClass'"):
        _ = import_module("slicemod.training.stable_diffusion").NoSuchClass
