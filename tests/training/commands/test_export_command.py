from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from PIL import Image

from slicemod.cli import BAD_INPUT, main
from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import CheckpointError, read_checkpoint, read_safetensors, write_safetensors
from slicemod.training.common.trained_weights import LoraSettings
from slicemod.training.stable_diffusion.compvis_layout import SD1_TEXT
from slicemod.training.stable_diffusion.denoising_objective import Objective
from slicemod.training.stable_diffusion.lightning_module import STORED, load_stable_diffusion
from slicemod.training.stable_diffusion.lora_file import kohya_tensors, write_lora
from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    whole_model,
    write_checkpoint,
    write_config,
    write_images,
    write_scheduler,
    write_text_parts,
    write_tiny_model,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and parts of a text encoder in the model that it began from."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
        source = write_tiny_model(folder / "sd15", "sd15")
        write_text_parts(source)
        config = tiny_config("sd15_full.yaml", source, write_images(folder / "images"), trainer={"max_steps": 2})
        fit(["fit", "--config", write_config(folder, config)])
    return folder


@pytest.fixture
def checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's last checkpoint, in the run's folder as the current one."""
    monkeypatch.chdir(run)
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
    return run / "checkpoints" / "last.ckpt"


def unet_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(checkpoint)["state_dict"]
    return {name.removeprefix("unet."): tensor for name, tensor in state.items()}


def assert_same(first: Any, second: Any) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_diffusers_folder_holds_every_part_and_the_trained_unet(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "pipeline"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    assert_same(UNet2DConditionModel.from_pretrained(out / "unet", low_cpu_mem_usage=False).state_dict(),
                unet_weights(checkpoint))  # fmt: skip
    AutoencoderKL.from_pretrained(out / "vae", low_cpu_mem_usage=False)
    assert DDIMScheduler.from_pretrained(out / "scheduler").config.prediction_type == "epsilon"
    index = json.loads((out / "model_index.json").read_text())
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    assert sorted(parts) == ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert all((out / part).is_dir() for part in parts)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_one_file_is_what_the_next_run_begins_from(suffix: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out), "--format", "compvis"]) == 0
    tensors, metadata = read_safetensors(out)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["slicemod.step"] == "2"
    assert f"{SD1_TEXT}text_model.final_layer_norm.bias" in tensors
    if suffix == ".ckpt":
        out = out.with_suffix(".ckpt")
        torch.save({"state_dict": tensors}, out)
    pretrained = Pretrained(str(out), "sd15")
    assert_same(pretrained.load_unet().state_dict(), unet_weights(checkpoint))
    assert_same(pretrained.load_autoencoder().state_dict(), Pretrained("sd15").load_autoencoder().state_dict())


def test_a_run_from_one_file_exports_what_it_did_not_train_as_it_was(
    checkpoint: Path, tmp_path: Path, run: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(first), "--format", "compvis"]) == 0
    folder = tmp_path / "again"
    folder.mkdir()
    config = tiny_config("sd15_full.yaml", first, run / "images", trainer={"max_steps": 1},
                         model={"config_source": str(run / "sd15"), "trained": "attention"})  # fmt: skip
    config["trainer"]["callbacks"][0]["init_args"]["dirpath"] = str(folder)
    fit(["fit", "--config", write_config(folder, config)])
    options = ["--checkpoint", str(folder / "last.ckpt"), "--out", str(second), "--format", "compvis"]
    assert main(["export", *options, "--dtype", "float16"]) == 0
    before, after = read_safetensors(first)[0], read_safetensors(second)[0]
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name].half(), after[name])}
    assert changed
    assert all(".attn1." in name or ".attn2." in name for name in changed)


def test_what_cannot_be_exported_is_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, named in (
        (["--format", "lora", "--out", str(tmp_path / "lora.safetensors")], "is no low-rank adapter"),
        (["--format", "compvis", "--out", str(tmp_path / "model.ckpt")], "--out must name a .safetensors file"),
        (["--format", "compvis", "--out", "no/such/a.safetensors"], "--out: expected a file in a folder that exists"),
        (["--out", str(tmp_path), "--source", "no/such/folder"], "found nothing at no/such/folder"),
    ):
        assert main(["export", "--checkpoint", str(checkpoint), *options]) == BAD_INPUT
        assert named in capsys.readouterr().err


def test_a_checkpoint_beside_other_frozen_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    content[STORED] |= {"trained": "attention", "base_digest": "of another model"}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt does not belong to this model"):
        load_stable_diffusion(tmp_path / "other.ckpt")


def adapters(rank: int) -> dict[str, torch.Tensor]:
    """As peft names them in a fine-tuning's checkpoint."""
    layers = [f"down_blocks.1.attentions.0.transformer_blocks.0.attn{n}.{part}" for n in (1, 2) for part in
              ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip
    shapes = {"A": (rank, 16), "B": (16, rank)}
    return {f"unet.{layer}.lora_{part}.default.weight": torch.randn(shape)
            for layer in layers for part, shape in shapes.items()}  # fmt: skip


def test_a_lora_file_is_understood_by_diffusers(tmp_path: Path) -> None:
    rank, alpha = 3, 6.0
    state = adapters(rank)
    write_lora(tmp_path / "lora.safetensors", state, {"rank": rank, "alpha": alpha}, {"slicemod.step": "7"})
    tensors, metadata = read_safetensors(tmp_path / "lora.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["slicemod.step"]) == ("3", "6.0", "7")
    read, alphas = _convert_non_diffusers_lora_to_diffusers(tensors)
    assert set(alphas.values()) == {alpha}
    ends = (".up.weight", ".down.weight")
    products = [
        read[name.replace(ends[1], ends[0])] @ tensor for name, tensor in read.items() if name.endswith(ends[1])
    ]
    assert len(products) == len(state) // 2
    wanted = [state[name.replace("lora_A", "lora_B")] @ tensor for name, tensor in state.items() if "lora_A" in name]
    for product in products:
        assert any(torch.equal(product, other) for other in wanted)


def test_other_weights_are_no_lora() -> None:
    with pytest.raises(CheckpointError, match=r"unet\.conv_in\.weight, which is no low-rank adapter"):
        kohya_tensors({"unet.conv_in.weight": torch.zeros(1)}, 1.0)


@pytest.mark.parametrize(
    ("source", "config_source", "named"),
    [
        ("missing.safetensors", "sd15", "expected a file, found none at missing.safetensors"),
        ("sd15", "sd15", "describes a single file"),
        ("cut.safetensors", None, "config_source is missing"),
        ("cut.safetensors", "sd15", r"cut.safetensors cannot be read as safetensors"),
        ("other.safetensors", "sd15", "no Stable Diffusion checkpoint of the CompVis layout"),
        ("part.safetensors", "sd15", "keys are missing"),
        ("evil.ckpt", "sd15", "evil.ckpt is refused"),
        ("images", None, r"model.source: images \(unet/\) cannot be read"),
    ],
)
def test_weights_that_cannot_be_used_are_named(
    source: str, config_source: str | None, named: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("cut.safetensors").write_bytes(b"\0" * 9)
    write_safetensors("other.safetensors", {"weight": torch.zeros(2)}, {})
    write_safetensors("part.safetensors", {"model.diffusion_model.out.2.bias": torch.zeros(4)}, {})
    torch.save({"state_dict": Path}, "evil.ckpt")
    with pytest.raises(UserError, match=named):
        Pretrained(source, config_source).load_unet()


@pytest.mark.parametrize(
    ("kind", "scheduler", "zeroed", "negative"),
    [
        ("sd15", "PNDMScheduler", None, None),
        ("sd15", "EulerAncestralDiscreteScheduler", None, "a dog"),
        ("sdxl", "EulerDiscreteScheduler", None, None),
        ("sdxl", "EulerDiscreteScheduler", False, None),
        ("sdxl", "EulerDiscreteScheduler", True, ""),
    ],
)
def test_the_exported_pipeline_draws_what_sample_draws(
    kind: str, scheduler: str, zeroed: bool | None, negative: str | None, tmp_path: Path
) -> None:
    source = whole_model(tmp_path / kind, kind, length=77)
    write_scheduler(source, scheduler)
    if zeroed is not None:
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": zeroed}
        (source / "model_index.json").write_text(json.dumps(index))
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, trained="attention")
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "pipeline")]) == 0
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    assert type(pipeline.scheduler).__name__ == scheduler
    assert kind != "sdxl" or pipeline.config.force_zeros_for_empty_prompt == (zeroed is not False)
    how = {"height": 24, "width": 40, "num_inference_steps": 5, "guidance_scale": 5.0, "negative_prompt": negative}
    theirs = pipeline("a cat", generator=torch.Generator().manual_seed(13), output_type="np", **how).images[0]

    options = ["--height", "24", "--width", "40", "--steps", "5", "--guidance", "5", "--seed", "13"]
    options += [] if negative is None else ["--negative-prompt", negative]
    out = tmp_path / "ours.png"
    assert main(["sample", "--checkpoint", str(checkpoint), "--prompt", "a cat", "--out", str(out), *options]) == 0
    ours = np.asarray(Image.open(out), dtype=np.float32) / 255
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= 1 / 255


@pytest.mark.parametrize("form", ["diffusers", "compvis"])
def test_adapters_are_added_to_weights_that_were_not_rounded(form: str, tmp_path: Path) -> None:
    source = whole_model(tmp_path / "sd15", "sd15")
    settings: dict[str, Any] = {"trained": "lora", "lora": LoraSettings(rank=3, alpha=3.0, targets=["to_q"])}
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, frozen_dtype="bfloat16", **settings)
    out = tmp_path / ("pipeline" if form == "diffusers" else "model.safetensors")
    assert main(["export", "--checkpoint", str(checkpoint), "--format", form, "--out", str(out)]) == 0
    single = Pretrained(str(out), str(source)) if form == "compvis" else Pretrained(str(out))
    merged, base = single.load_unet().state_dict(), Pretrained(str(source)).load_unet().state_dict()
    state = read_checkpoint(checkpoint)["state_dict"]
    for name, weight in base.items():
        stem = f"unet.{name.removesuffix('.weight')}"
        if name.endswith("to_q.weight"):
            down, up = (state[f"{stem}.lora_{part}.default.weight"] for part in "AB")
            weight = weight + up @ down
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-7)


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    for kind, velocity, model, adapter in (
        ("sd15", False, "stable-diffusion-v1", "sd_v1"),
        ("sd21", True, "stable-diffusion-v2-768-v", "sd_v2_v"),
        ("sdxl", False, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    ):
        source = whole_model(tmp_path / kind, kind)
        checkpoint = write_checkpoint(tmp_path / f"{kind}.ckpt", source, trained="lora")
        said = {}
        for form in ("compvis", "lora"):
            out = tmp_path / f"{kind}-{form}.safetensors"
            assert main(["export", "--checkpoint", str(checkpoint), "--format", form, "--out", str(out)]) == 0
            said[form] = read_safetensors(out)[1]
        for form, named in (("compvis", model), ("lora", f"{model}/lora")):
            assert said[form]["modelspec.architecture"] == named
            assert said[form]["modelspec.title"] == f"{kind}-{form}"
            assert said[form]["modelspec.prediction_type"] == ("v" if velocity else "epsilon")
        assert said["compvis"]["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
        assert said["compvis"]["modelspec.resolution"] == "16x16"
        assert not any(name.startswith("ss_") for name in said["compvis"])
        assert said["lora"]["modelspec.implementation"] == "diffusers"
        assert said["lora"]["ss_base_model_version"] == adapter
        assert said["lora"]["ss_v2"] == str(kind == "sd21")


def test_the_dtype_is_that_of_every_part_and_whole_numbers_stay_whole(tmp_path: Path) -> None:
    source = whole_model(tmp_path / "sd15", "sd15")
    encoder = source / "text_encoder" / "model.safetensors"
    tensors, metadata = read_safetensors(encoder)
    write_safetensors(encoder, {**tensors, "embeddings.position_ids": torch.arange(11)[None]}, metadata)
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, trained="attention")
    out = tmp_path / "pipeline"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out), "--dtype", "bfloat16"]) == 0
    written = {file: read_safetensors(file)[0] for file in out.rglob("*.safetensors")}
    assert len(written) == 3
    kinds = {name: tensor.dtype for tensors in written.values() for name, tensor in tensors.items()}
    assert kinds.pop("embeddings.position_ids") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_schedule_that_the_own_scheduler_does_not_know_is_drawn_by_ddim_which_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = whole_model(tmp_path / "sd15", "sd15")
    write_scheduler(source, "PNDMScheduler", skip_prk_steps=True)
    objective = Objective(prediction_type="v_prediction", zero_terminal_snr=True)
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, trained="attention", objective=objective)
    out = tmp_path / "pipeline"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    assert "PNDMScheduler knows no rescale_betas_zero_snr" in capsys.readouterr().out
    config = DDIMScheduler.load_config(out / "scheduler")
    assert config["_class_name"] == "DDIMScheduler"
    assert config["rescale_betas_zero_snr"]
    assert (config["timestep_spacing"], config["prediction_type"]) == ("trailing", "v_prediction")


def test_a_source_that_has_gone_is_named_with_the_option_that_says_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = whole_model(tmp_path / "sd15", "sd15")
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, trained="lora", frozen_dtype="bfloat16")
    source.rename(tmp_path / "moved")
    options = ["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main(options) == BAD_INPUT
    told = capsys.readouterr().err
    assert f"found nothing at {source}" in told
    assert "--source" in told
    assert not (tmp_path / "out").exists()
    assert main([*options, "--source", str(tmp_path / "moved")]) == 0


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("kind", ["*.safetensors", "config.json"])
def test_a_file_of_the_source_that_is_cut_short_is_named_and_nothing_is_written(
    kind: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = whole_model(tmp_path / "sd15", "sd15")
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, trained="attention")
    (file,) = (source / part).glob(kind)
    file.write_bytes(file.read_bytes()[:-7])
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = whole_model(tmp_path / "sd15", "sd15")
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, trained="lora")
    content = read_checkpoint(checkpoint)
    for name, value, form in (
        ("lora", "much", "lora"),
        ("lora", "much", "diffusers"),
        ("lora", {"rang": 4}, "diffusers"),
        ("objective", 3, "diffusers"),
        ("trained", None, "lora"),
        ("unet", [], "lora"),
    ):
        torch.save({**content, STORED: {**content[STORED], name: value}}, checkpoint)
        out = str(tmp_path / "out.safetensors")
        assert main(["export", "--checkpoint", str(checkpoint), "--format", form, "--out", out]) == BAD_INPUT
        assert str(checkpoint) in capsys.readouterr().err


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file can grow beyond 40 kB, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_said_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                         request: pytest.FixtureRequest) -> None:  # fmt: skip
    source = whole_model(tmp_path / "sd15", "sd15")
    assert (source / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size > 40_000
    checkpoint = write_checkpoint(tmp_path / "run.ckpt", source, trained="attention")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    request.getfixturevalue("little_room")
    for form, out in (("diffusers", "new/pipeline"), ("diffusers", "empty"), ("compvis", "model.safetensors")):
        options = ["--format", form, "--out", str(tmp_path / out)]
        assert main(["export", "--checkpoint", str(checkpoint), *options]) == BAD_INPUT
        assert f"{tmp_path / out} cannot be written" in capsys.readouterr().err
        assert not (tmp_path / out).is_dir() or out == "empty"
    (tmp_path / "new").rmdir()
    assert sorted(tmp_path.rglob("*")) == before
