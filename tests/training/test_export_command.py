from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

from slicemod.cli import BAD_INPUT, main
from slicemod.training.checkpoints import CheckpointError, read_checkpoint, read_safetensors, write_safetensors
from slicemod.training.compvis_layout import SD1_TEXT
from slicemod.training.fit_command import fit
from slicemod.training.lora_file import kohya_tensors, write_lora
from slicemod.training.pretrained import Pretrained
from slicemod.training.stable_diffusion import STORED, load_stable_diffusion
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    write_config,
    write_images,
    write_text_parts,
    write_tiny_model,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and parts of a text encoder in the model that it began from."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("slicemod.training.stable_diffusion.load_text_encoders", letter_encoders)
        source = write_tiny_model(folder / "sd15", "sd15")
        write_text_parts(source)
        config = tiny_config("sd15_full.yaml", source, write_images(folder / "images"), trainer={"max_steps": 2})
        fit(["fit", "--config", write_config(folder, config)])
    return folder


@pytest.fixture
def checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's last checkpoint, in the run's folder as the current one."""
    monkeypatch.chdir(run)
    monkeypatch.setattr("slicemod.training.stable_diffusion.load_text_encoders", letter_encoders)
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
