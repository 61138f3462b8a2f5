from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import CheckpointError, read_checkpoint, read_safetensors, write_safetensors
from slicemod.training.common.pictures import read_metric
from slicemod.training.common.trained_weights import trained_names
from slicemod.training.stable_diffusion.aspect_buckets import Bucket
from slicemod.training.stable_diffusion.captioned_images import Crop, read_crop
from slicemod.training.stable_diffusion.denoising_objective import Objective
from slicemod.training.stable_diffusion.lightning_module import StableDiffusion, load_stable_diffusion
from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    CONFIGS,
    POOLED,
    TOKENS,
    WIDTH,
    letter_encoders,
    tiny_config,
    whole_model,
    write_config,
    write_images,
    write_tiny_model,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, in which captions are encoded by the letter encoders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
    write_images(tmp_path / "images")
    return tmp_path


def train(folder: Path, name: str, kind: str, *options: str, **changes: Any) -> Any:
    source = folder / kind
    if not source.exists():
        write_tiny_model(source, kind)
    config = write_config(folder, tiny_config(name, source, folder / "images", **changes))
    return fit(["fit", "--config", config, *options])


@pytest.mark.parametrize(("name", "kind"), [("sd15_full.yaml", "sd15"), ("sd21_v.yaml", "sd21")])
def test_a_config_trains_a_small_model(name: str, kind: str, here: Path) -> None:
    run = train(here, name, kind)
    log = Path(run.trainer.log_dir) / "metrics.csv"
    assert [step for step, _ in read_metric(log, "train/loss")] == [0, 1, 2, 3]
    assert len(read_metric(log, "val/loss")) == 2
    assert all(rate > 0 for _, rate in read_metric(log, "speed/images_per_s"))
    assert all(steps >= 1 for _, steps in read_metric(log, "plan/steps"))
    assert sorted(file.name for file in (here / "samples").iterdir()) == ["step2.png", "step4.png"]
    checkpoint = read_checkpoint(here / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert set(checkpoint["state_dict"]) == trained_names(run.model)
    before_the_end = read_checkpoint(here / "checkpoints" / "previous.ckpt")
    average, current = before_the_end["state_dict"], before_the_end["current_model_state"]
    assert any(not torch.equal(average[name], current[name]) for name in average)


@pytest.mark.parametrize("name", ["sd15_full.yaml", "sd15_lora.yaml", "sd21_v.yaml", "sdxl_lora.yaml"])
def test_every_shipped_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(["fit", "--config", str(CONFIGS / name), "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["task"] == "stable_diffusion"
    assert resolved["model"]["trained"] in name.replace("v.yaml", "attention")
    assert resolved["trainer"]["max_steps"] == resolved["model"]["lr_scheduler"]["init_args"].get("total_steps") or (
        resolved["model"]["lr_scheduler"]["init_args"]["decay"] == "constant"
    )


def test_sdxls_unet_is_trained_whole_from_two_texts_and_sizes(here: Path) -> None:
    run = train(here, "sd15_full.yaml", "sdxl", trainer={"max_steps": 2})
    assert run.model.is_sdxl
    assert all(math.isfinite(loss) for _, loss in logged(run, "train/loss"))


def test_only_the_attention_changes_where_only_it_is_trained(here: Path) -> None:
    before = {name: tensor.clone() for name, tensor in load_unet(here, "sd21").items()}
    run = train(here, "sd21_v.yaml", "sd21")
    changed = {name for name, tensor in run.model.unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".attn1." in name or ".attn2." in name for name in changed)


def test_sliced_attention_gives_the_losses_of_the_models_own(here: Path) -> None:
    sliced = logged(train(here, "sd15_full.yaml", "sd15"), "train/loss")
    shutil.rmtree(here / "checkpoints")
    own = logged(train(here, "sd15_full.yaml", "sd15", attention=None), "train/loss")
    assert [loss for _, loss in sliced] == pytest.approx([loss for _, loss in own], rel=1e-5)


@pytest.mark.slow
def test_block_checkpointing_changes_nothing_but_memory(here: Path) -> None:
    kept = logged(train(here, "sd15_full.yaml", "sd15", model={"block_checkpointing": False}), "train/loss")
    shutil.rmtree(here / "checkpoints")
    run = train(here, "sd15_full.yaml", "sd15", model={"block_checkpointing": True})
    assert run.model.unet.is_gradient_checkpointing
    assert [loss for _, loss in kept] == pytest.approx([loss for _, loss in logged(run, "train/loss")], rel=1e-6)


@pytest.mark.parametrize(
    "precision", [pytest.param("bf16-mixed", marks=pytest.mark.slow), pytest.param("16-mixed", marks=pytest.mark.cuda)]
)
def test_mixed_precision_stays_near_float32(precision: str, here: Path) -> None:
    device = ("--trainer.accelerator", "gpu" if precision == "16-mixed" else "cpu")
    whole = logged(train(here, "sd15_full.yaml", "sd15", *device), "train/loss")
    shutil.rmtree(here / "checkpoints")
    mixed = logged(train(here, "sd15_full.yaml", "sd15", *device, "--trainer.precision", precision), "train/loss")
    assert [loss for _, loss in mixed] == pytest.approx([loss for _, loss in whole], rel=0.02)
    assert all(one != other for one, other in zip(mixed, whole, strict=True))


@pytest.mark.slow
def test_a_compiled_unet_has_the_losses_of_one_that_is_not(here: Path) -> None:
    short = {"data": {"max_ratio": 1.0}, "trainer": {"max_steps": 2, "limit_val_batches": 0}}  # each size is compiled
    eager = logged(train(here, "sd15_full.yaml", "sd15", **short), "train/loss")
    shutil.rmtree(here / "checkpoints")
    torch.compiler.reset()
    compiled = train(here, "sd15_full.yaml", "sd15", model={"compile": True}, **short)
    assert [loss for _, loss in logged(compiled, "train/loss")] == pytest.approx([loss for _, loss in eager], rel=1e-4)


def test_validation_is_at_fixed_timesteps_and_noise(here: Path) -> None:
    run = train(here, "sd15_full.yaml", "sd15", model={"val_timesteps": [10, 900]}, trainer={"max_steps": 2})
    first = {name: value for name, value in run.trainer.callback_metrics.items() if name.startswith("val/")}
    assert set(first) == {"val/loss", "val/loss_t10", "val/loss_t900"}
    mean = (first["val/loss_t10"] + first["val/loss_t900"]) / 2
    assert float(first["val/loss"]) == pytest.approx(float(mean))
    for _ in range(2):  # the weights do not change any more
        (again,) = run.trainer.validate(run.model, datamodule=run.datamodule, verbose=False)
        assert again["val/loss"] == pytest.approx(float(first["val/loss"]), rel=1e-6)


def test_sample_images_do_not_depend_on_when_they_are_drawn(here: Path) -> None:
    frozen = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
    run = train(here, "sd15_full.yaml", "sd15", model={"optimizer": frozen, "lr_scheduler": None})
    first, second = sorted((here / "samples").iterdir())
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        assert picture.size == (2 * 32 + 2, 32)
        assert picture.mode == "RGB"
    (logger,) = (logger for logger in run.trainer.loggers if isinstance(logger, TensorBoardLogger))
    events: Any = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [len(events.Images(f"samples/{prompt}")) for prompt in ("a photo of a cat", "the sea")] == [2, 2]


class MeanColours(torch.nn.Module):
    """A feature extractor without weights."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(2).mean(-1)


@pytest.mark.parametrize("metric", ["kid", pytest.param("fid", marks=pytest.mark.slow)])
def test_samples_are_compared_by_the_feature_extractor_that_is_given(metric: str, here: Path) -> None:
    quality = {
        "class_path": "slicemod.training.sample_quality.SampleQuality",
        "init_args": {"feature_extractor": {"class_path": f"{__name__}.MeanColours"}, "metric": metric, "steps": 1},
    }
    run = train(here, "sd15_full.yaml", "sd15", "--trainer.callbacks+", json.dumps(quality), data={"val_count": 2},
                trainer={"max_steps": 2})  # fmt: skip
    assert math.isfinite(float(run.trainer.callback_metrics[f"val/{metric}"]))


class SeenImages(MeanColours):
    """Keeps what it was given."""

    seen: ClassVar[list[torch.Tensor]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return super().forward(images)


def test_samples_are_compared_with_the_crops_whose_latents_are_cached(here: Path) -> None:
    shutil.rmtree(here / "images")
    (here / "images").mkdir()
    for number in range(3):
        picture = Image.linear_gradient("L").rotate(90).resize((37, 32)).point(lambda grey, n=number: grey // (n + 1))
        picture.save(here / "images" / f"{number}.png")
        (here / "images" / f"{number}.txt").write_text("a slope")
    quality = {
        "class_path": "slicemod.training.sample_quality.SampleQuality",
        "init_args": {"feature_extractor": {"class_path": f"{__name__}.SeenImages"}, "steps": 1},
    }
    run = train(here, "sd15_full.yaml", "sd15", "--trainer.callbacks+", json.dumps(quality),
                data={"val_count": 2, "max_ratio": 1}, trainer={"max_steps": 2})  # fmt: skip
    (batch,) = run.datamodule.val_dataloader()
    real = SeenImages.seen[-4::2]
    for image, ids, seen in zip(run.datamodule.val_images, batch["time_ids"].int().tolist(), real, strict=True):
        assert ids == [32, 37, 0, 3, 32, 32]
        shown = read_crop(image, Bucket(32, 32), Crop(0, 3, flipped=False))
        assert torch.equal(seen[0], ((shown + 1) * 127.5).round().byte())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.source", "no/such/folder"], "found nothing at no/such/folder"),
        (["--data.folder", "missing"], "data.folder: expected a folder of images"),
        (["--data.bucket_step", "1"], "data.bucket_step must be a multiple of 4"),
        (["--model.val_timesteps", "[1000]"], "model.val_timesteps must be from 0 to 999"),
        (["--model.frozen_dtype", "bfloat16"], "model.frozen_dtype: expected float32"),
        (["--model.objective.min_snr_gamma", "-1"], "min_snr_gamma must be above 0"),
        (["--data.val_count", "0"], "SampleImages works in validation"),
        (["--task", "stable"], "task: expected one of digits, stable_diffusion, got 'stable'"),
    ],
    ids=" ".join,
)
def test_fit_names_what_it_cannot_use(options: list[str], named: str, here: Path) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        train(here, "sd15_full.yaml", "sd15", *options)


def test_a_run_continues_only_beside_the_weights_that_it_began_with(here: Path) -> None:
    train(here, "sd21_v.yaml", "sd21", trainer={"max_steps": 1})
    write_tiny_model(here / "other", "sd21")
    weights = here / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, _ = read_safetensors(weights)
    write_safetensors(weights, {**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, {"format": "pt"})
    config = write_config(here, tiny_config("sd21_v.yaml", here / "other", here / "images"))
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not belong to this model"):
        fit(["fit", "--config", config, "--ckpt_path", "last"])


def load_unet(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The weights that a run of ``kind`` begins with."""
    return dict(Pretrained(str(write_tiny_model(folder / kind, kind))).load_unet().state_dict())


def logged(run: Any, name: str) -> list[tuple[int, float]]:
    """A metric in the run's CSV log."""
    return read_metric(Path(run.trainer.log_dir) / "metrics.csv", name)


@pytest.mark.parametrize("zeroed", [True, False])
def test_a_dropped_caption_of_sdxl_is_what_its_pipeline_has_for_no_text(zeroed: bool, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "sdxl", "sdxl")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": zeroed}
    (source / "model_index.json").write_text(json.dumps(index))
    model = StableDiffusion(str(source), trained="attention", objective=Objective(caption_dropout=1.0))
    count = 3
    batch: dict[str, Any] = {
        "mean": torch.randn(count, 4, 8, 8), "std": torch.zeros(count, 4, 8, 8), "time_ids": torch.ones(count, 6),
        "context": torch.randn(count, TOKENS, WIDTH), "pooled": torch.randn(count, POOLED),
        "empty_context": torch.randn(1, TOKENS, WIDTH), "empty_pooled": torch.randn(1, POOLED),
        "numbers": [5, 7, 2], "total": count,
    }  # fmt: skip
    dropped = model.denoising_losses(cast(Any, batch))
    for part in ("context", "pooled"):
        empty = batch[f"empty_{part}"].expand_as(batch[part])
        batch[part] = torch.zeros_like(empty) if zeroed else empty
    model.objective = Objective(caption_dropout=0.0)
    torch.testing.assert_close(dropped, model.denoising_losses(cast(Any, batch)))


def test_captions_that_are_cut_are_told_once_and_longer_ones_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = whole_model(tmp_path / "sd15", "sd15", length=77)
    images = write_images(tmp_path / "images")
    (images / "cat.txt").write_text("a" * 76)
    (images / "dog.txt").write_text("b" * 151)
    config = tiny_config(
        "sd15_full.yaml", source, images, trainer={"max_steps": 1}, data={"batch_size": 5, "val_count": 1}
    )
    for tokens, told in ((75, "2 of 5 captions have more than 75 tokens"), (150, "1 of 5 captions"), (225, None)):
        config["model"]["max_tokens"] = tokens
        run = fit(["fit", "--config", write_config(tmp_path, config)])
        said = capsys.readouterr().err
        assert said.count("captions have more than") == (told is not None)
        assert told is None or f"{told}" in said
        assert run.model.context_tokens == tokens // 75 * 77
        (batch,) = [batch for batch in run.datamodule.train_dataloader() if 0 in batch["numbers"]]
        assert batch["context"].shape[1:] == (run.model.context_tokens, WIDTH)
        assert load_stable_diffusion(tmp_path / "checkpoints" / "last.ckpt").max_tokens == tokens
        shutil.rmtree(tmp_path / "checkpoints")
