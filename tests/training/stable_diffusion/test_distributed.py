"""Two processes on the CPU train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import read_checkpoint
from slicemod.training.common.pictures import read_metric
from slicemod.training.common.step_meter import current_plans
from slicemod.training.common.weight_average import WeightAverage
from slicemod.training.stable_diffusion.aspect_buckets import Bucket
from slicemod.training.stable_diffusion.captioned_folder import BucketBatches
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    write_config,
    write_images,
    write_tiny_model,
)

ROOT = Path(__file__).parents[3]
NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
PATIENCE = 240  # seconds for two processes to import everything on a busy machine


class Witness(Callback):
    """Writes what this process saw: the files of each batch and the plans after it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        plans = {name: str(plan) for name, plan in current_plans(pl_module.swap_report).items()}
        self.seen.append({"numbers": batch["numbers"], "files": batch["files"], "plans": plans})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        Path(f"witness{trainer.global_rank}.json").write_text(json.dumps(self.seen), encoding="utf-8")


def two_processes(folder: Path, config: str, *options: str) -> None:
    """Runs the configuration by torchrun in ``folder``."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.training.run_with_letters", "fit", "--config", config, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def losses(folder: Path) -> list[float]:
    (log,) = (folder / "logs" / "csv").glob("*/metrics.csv")
    return [loss for _, loss in read_metric(log, "train/loss")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "name"),
    [("ddp", "sd15_full.yaml"), ("fsdp", "sd15_full.yaml"), pytest.param("fsdp", "sd15_lora.yaml", marks=NEEDS_PEFT)],
)
def test_two_processes_train_as_one_does(
    strategy: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
    content = tiny_config(
        name,
        write_tiny_model(tmp_path / "sd15", "sd15"),
        write_images(tmp_path / "images"),
        model={"frozen_dtype": "float32"},  # rounding to half of it depends on the batch
        data={"batch_size": 1, "flip": True, "val_count": 1, "max_ratio": 1.0},
    )
    callbacks = content["trainer"]["callbacks"]
    if strategy == "fsdp":
        callbacks[:] = [callback for callback in callbacks if not callback["class_path"].endswith("WeightAverage")]
    callbacks.append({"class_path": f"{__name__}.Witness"})
    config = write_config(tmp_path, content)
    folders = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders.values():
        folder.mkdir()

    monkeypatch.chdir(folders["one"])
    fit(["fit", "--config", config, "--data.batch_size", "2"])
    two_processes(folders["two"], config, "--trainer.strategy", strategy, "--trainer.devices", "2")

    assert losses(folders["two"]) == pytest.approx(losses(folders["one"]), rel=1e-5)
    one, first, second = (
        json.loads(file.read_text())
        for file in (folders["one"] / "witness0.json", *sorted(folders["two"].glob("witness*.json")))
    )
    for shared, left, right in zip(one, first, second, strict=True):
        assert left["files"] + right["files"] == shared["files"]
        assert left["numbers"] + right["numbers"] == shared["numbers"]
        assert left["plans"] == right["plans"] != {}
    together = read_checkpoint(folders["two"] / "checkpoints" / "last.ckpt")
    alone = read_checkpoint(folders["one"] / "checkpoints" / "last.ckpt")
    for name, tensor in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], tensor, rtol=1e-3, atol=1e-6)

    monkeypatch.chdir(folders["two"])  # where one process goes on
    more = ["--ckpt_path", "last", "--data.batch_size", "2", "--trainer.max_steps", "5"]
    run = fit(["fit", "--config", config, *more])
    assert run.trainer.global_step == 5
    again = ["--ckpt_path", "last", "--trainer.strategy", strategy, "--trainer.devices", "2"]  # and two after it
    two_processes(folders["two"], config, *again, "--trainer.max_steps", "6")
    assert read_checkpoint(folders["two"] / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_an_average_of_sharded_weights_is_refused() -> None:
    sharded: Any = SimpleNamespace(device_mesh=object())
    trainer: Any = SimpleNamespace()
    with pytest.raises(UserError, match="WeightAverage keeps a whole copy of the weights in every process"):
        WeightAverage().setup(trainer, sharded, "fit")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_every_batch_without_duplicates(world_size: int) -> None:
    buckets = [Bucket(8, 8)] * 7 + [Bucket(8, 16)] * 5

    def load(images: Any, variants: Any) -> dict[str, Any]:
        return {"images": list(images), "variants": list(variants)}

    def ranks(size: int, batch_size: int) -> list[list[Any]]:
        return [
            list(BucketBatches(buckets, batch_size, 3, 0, load, rank=rank, world_size=size)) for rank in range(size)
        ]

    steps = list(zip(*ranks(world_size, 2), strict=True))
    seen = [image for step in steps for part in step for image in part["images"]]
    assert len(seen) == len(set(seen)) == sum(count - count % world_size for count in (7, 5))
    for step in steps:
        assert len({len(part["images"]) for part in step}) == 1
        assert len({buckets[image] for part in step for image in part["images"]}) == 1
        assert len({number for part in step for number in part["numbers"]}) == world_size * len(step[0]["images"])
        assert {part["total"] for part in step} == {world_size * len(step[0]["images"])}
