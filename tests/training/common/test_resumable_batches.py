"""Images are counted, not batches: a run goes on with other sizes of batches and loses and repeats none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import read_checkpoint
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

BUCKETS = [Bucket(8, 8)] * 11 + [Bucket(8, 16)] * 7 + [Bucket(16, 8)] * 2


def batches(batch_size: int, *, seed: int | None = 3, world_size: int = 1) -> BucketBatches:
    def load(images: Any, variants: Any) -> dict[str, Any]:
        return {"images": list(images), "variants": list(variants)}

    return BucketBatches(BUCKETS, batch_size, 4, seed, load, world_size=world_size)


def seen(loader: Any, count: int | None = None) -> dict[int, tuple[int, int]]:
    """Number and variant of each image of the next ``count`` batches of an epoch; no image comes twice."""
    found: dict[int, tuple[int, int]] = {}
    for place, batch in enumerate(loader):
        for image, number, variant in zip(batch["images"], batch["numbers"], batch["variants"], strict=True):
            assert image not in found
            found[image] = number, variant
        if place + 1 == count:
            break
    return found


@pytest.mark.parametrize("done", [1, 3, 6])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_another_size_of_batches_sees_the_rest_of_the_epoch_with_the_same_noise(done: int, size: int) -> None:
    whole = seen(batches(3))
    assert whole.keys() == set(range(20))
    first = batches(3)
    begun = seen(first, done)
    again = batches(size)
    again.load_state_dict(first.state_dict())
    rest = seen(again)
    assert not begun.keys() & rest.keys()
    assert begun | rest == whole
    assert seen(again) != whole  # the next epoch


def test_two_processes_see_the_rest_of_an_epoch_that_one_began() -> None:
    first = batches(3)
    begun = seen(first, 2)
    again = batches(1, world_size=2)
    again.load_state_dict(first.state_dict())
    left = again.plan_epoch(0, first.state_dict()["seen"])
    rest = [image for planned in left for image in planned.images]
    assert len(rest) == len(set(rest)) >= 20 - len(begun) - 3  # an odd image of each bucket waits
    assert not begun.keys() & set(rest)
    assert all(len(planned.images) == 2 for planned in left)


def test_no_two_images_of_all_epochs_have_one_number() -> None:
    loader = batches(3)
    numbers = [number for _ in range(3) for number, _ in seen(loader).values()]
    assert sorted(numbers) == list(range(3 * 20))


def test_images_that_are_held_out_have_the_same_numbers_each_time() -> None:
    loader = batches(3, seed=None)
    assert seen(loader) == seen(loader) == {image: (image, 0) for image in range(20)}


def test_batches_of_one_epoch_mix_the_buckets() -> None:
    groups = [planned.group for planned in batches(2).plan_epoch(0)]
    assert groups != sorted(groups)
    assert Counter(groups) == {0: 6, 1: 4, 2: 1}


def test_other_images_begin_a_new_epoch() -> None:
    loader = batches(3)
    loader.load_state_dict({"epoch": 0, "groups": [2, 11, 6], "seen": [1, 2, 3]})
    assert sorted(number for number, _ in seen(loader).values()) == list(range(20, 40))


def test_a_position_in_batches_is_refused() -> None:
    with pytest.raises(UserError, match="counts batches and not images"):
        batches(3).load_state_dict({"epoch": 0, "next_batch": 2})


class Witness(Callback):
    """Keeps the images and numbers of each batch."""

    seen: list[tuple[list[str], list[int]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(([Path(file).name for file in batch["files"]], batch["numbers"]))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Four images of one size, without an average of the weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
    monkeypatch.setattr(Witness, "seen", [])
    content = tiny_config(
        "sd15_full.yaml",
        write_tiny_model(tmp_path / "sd15", "sd15"),
        write_images(tmp_path / "images"),
        model={
            "lr_scheduler": None,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
        },
        data={"batch_size": 1, "max_ratio": 1.0},
        trainer={"gradient_clip_val": None, "limit_val_batches": 0},
    )
    content["trainer"]["callbacks"] = [content["trainer"]["callbacks"][0], {"class_path": f"{__name__}.Witness"}]
    return write_config(tmp_path, content)


@pytest.mark.parametrize(
    ("begin", "more", "steps"),
    [
        (["--trainer.max_steps", "1"], ["--data.batch_size", "2"], 1 + 2 + 2),
        pytest.param(["--trainer.max_steps", "1", "--data.batch_size", "3"], [], 1 + 1 + 4, marks=pytest.mark.slow),
        (["--trainer.max_steps", "3"], ["--trainer.accumulate_grad_batches", "3"], 3 + 1 + 2),
        pytest.param(
            ["--trainer.max_steps", "2", "--data.batch_size", "2"],
            ["--data.batch_size", "3"],
            2 + 0 + 2,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["larger", "smaller", "accumulated", "at the end of an epoch"],
)
def test_a_run_goes_on_with_other_batches_and_trains_on_each_image_once_an_epoch(
    begin: list[str], more: list[str], steps: int, config: str, tmp_path: Path
) -> None:
    fit(["fit", "--config", config, *begin])
    to_the_end = ["--ckpt_path", "last", "--trainer.max_steps", "-1", "--trainer.max_epochs", "2"]
    run = fit(["fit", "--config", config, *to_the_end, *more])
    names = [name for names, _ in Witness.seen for name in names]
    assert Counter(names) == dict.fromkeys(set(names), 2)
    assert len(set(names)) == len(set(names[:4])) == 4
    assert sorted(number for _, numbers in Witness.seen for number in numbers) == list(range(8))
    assert run.trainer.current_epoch == 2
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == steps


def test_images_that_were_added_begin_a_new_epoch_and_that_is_said(config: str, tmp_path: Path) -> None:
    fit(["fit", "--config", config, "--trainer.max_steps", "1"])
    (tmp_path / "images" / "new.png").write_bytes((tmp_path / "images" / "cat.png").read_bytes() + b" ")
    (tmp_path / "images" / "new.txt").write_text("new")
    with pytest.warns(UserWarning, match="The data has 5 images where the checkpoint's had 4"):
        fit(["fit", "--config", config, "--trainer.max_steps", "6", "--ckpt_path", "last"])
    assert [number for _, numbers in Witness.seen for number in numbers] == [0, 5, 6, 7, 8, 9]


def weights_after(config: str, folder: str, *options: str) -> dict[str, torch.Tensor]:
    """After one step; the checkpoints lie in ``folder``."""
    kind = "slicemod.training.last_checkpoint.LastCheckpoint"
    last = f'[{{"class_path": "{kind}", "init_args": {{"dirpath": "{folder}"}}}}]'
    fit(["fit", "--config", config, "--trainer.max_steps", "1", "--trainer.callbacks", last, *options])
    return dict(read_checkpoint(Path(folder) / "last.ckpt")["state_dict"])


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.accumulate_grad_batches", "7"],  # the epoch ends after four
        pytest.param(  # three images and one
            ["--trainer.accumulate_grad_batches", "2", "--data.batch_size", "3"], marks=pytest.mark.slow
        ),
    ],
    ids=["partial", "uneven"],
)
def test_the_gradient_of_accumulated_batches_is_the_mean_over_their_images(options: list[str], config: str) -> None:
    whole = weights_after(config, "whole", "--data.batch_size", "4")
    parts = weights_after(config, "parts", *options)
    start = weights_after(config, "start", "--model.optimizer.init_args.lr", "0")
    moved = 0.0
    for name, tensor in whole.items():
        step = (tensor - start[name]).abs().max().item()
        moved = max(moved, step)
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-3 * step + 1e-6)
    assert moved > 0.01
