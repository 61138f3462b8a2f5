"""Low-rank adapters by peft, and the text encoders of transformers, from training to diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from slicemod.cli import main
from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import read_checkpoint
from slicemod.training.common.trained_weights import trained_names
from slicemod.training.stable_diffusion.lightning_module import load_stable_diffusion
from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.training.stable_diffusion.text_encoders import load_text_encoders
from tests.training.tiny_stable_diffusion import (
    POOLED,
    WIDTH,
    letter_encoders,
    tiny_config,
    whole_model,
    write_config,
    write_images,
    write_tiny_model,
)

pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, with images."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    return tmp_path


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_captions_are_embedded_as_diffusers_pipelines_embed_them(kind: str, tmp_path: Path) -> None:
    import diffusers

    source = whole_model(tmp_path / kind, kind)
    ours = load_text_encoders(Pretrained(str(source))).encode(["a photo of a cat", ""])
    parts: dict[str, Any] = {
        name: getattr(transformers, cls).from_pretrained(source, subfolder=name)
        for name, cls in (("text_encoder", "CLIPTextModel"), ("tokenizer", "CLIPTokenizer"))
    }
    pipeline: Any = diffusers.StableDiffusionPipeline
    if kind == "sdxl":
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection.from_pretrained(
            source, subfolder="text_encoder_2"
        )
        parts["tokenizer_2"] = transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer_2")
        pipeline = diffusers.StableDiffusionXLPipeline
    pretrained = Pretrained(str(source))
    extra = (
        {} if kind == "sdxl" else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    parts |= {"unet": pretrained.load_unet(), "vae": pretrained.load_autoencoder()}
    pipe = pipeline(scheduler=pretrained.load_scheduler(), **parts, **extra)
    theirs = pipe.encode_prompt(
        ["a photo of a cat", ""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(ours.context, theirs[0])
    if kind == "sdxl":
        torch.testing.assert_close(ours.pooled, theirs[2])


@pytest.mark.parametrize(
    ("name", "kind"), [("sd15_lora.yaml", "sd15"), pytest.param("sdxl_lora.yaml", "sdxl", marks=pytest.mark.slow)]
)
def test_a_config_trains_adapters_and_diffusers_loads_them(name: str, kind: str, here: Path) -> None:
    source = whole_model(here / kind, kind)
    model = {"frozen_dtype": "float32", "lora": {"rank": 3, "alpha": 6.0, "targets": ["to_q", "to_v"]}}
    run = fit(["fit", "--config", write_config(here, tiny_config(name, source, here / "images", model=model))])
    checkpoint = here / "checkpoints" / "last.ckpt"
    state = read_checkpoint(checkpoint)["state_dict"]
    assert set(state) == trained_names(run.model)
    assert all(".lora_A." in key or ".lora_B." in key for key in state)
    assert any(bool(tensor.any()) for key, tensor in state.items() if ".lora_B." in key)

    assert main(["export", "--checkpoint", str(checkpoint), "--format", "lora", "--out", "lora.safetensors"]) == 0
    assert main(["export", "--checkpoint", str(checkpoint), "--out", "merged"]) == 0
    tuned = load_stable_diffusion(checkpoint).unet
    merged = UNet2DConditionModel.from_pretrained(here / "merged" / "unet", low_cpu_mem_usage=False)
    loader: Any = (
        __import__("diffusers").StableDiffusionXLPipeline
        if kind == "sdxl"
        else __import__("diffusers").StableDiffusionPipeline
    )
    loaded = Pretrained(str(source)).load_unet()
    weights, alphas = loader.lora_state_dict(str(here / "lora.safetensors"))[:2]
    loader.load_lora_into_unet(weights, network_alphas=alphas, unet=loaded)
    inputs: dict[str, Any] = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 500]),
                              "encoder_hidden_states": torch.randn(2, 7, WIDTH)}  # fmt: skip
    if kind == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, POOLED), "time_ids": torch.rand(2, 6)}
    with torch.no_grad():
        wanted = tuned(**inputs).sample
        for unet in (merged, loaded):
            torch.testing.assert_close(unet.eval()(**inputs).sample, wanted, rtol=1e-4, atol=1e-5)
        base = Pretrained(str(source)).load_unet()(**inputs).sample
    assert not torch.allclose(base, wanted, atol=1e-5)


def test_adapters_continue_bit_by_bit_with_dropout(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
    source = write_tiny_model(here / "sd15", "sd15")
    model = {"frozen_dtype": "bfloat16", "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_k"], "dropout": 0.3}}
    config = write_config(here, tiny_config("sd15_lora.yaml", source, here / "images", model=model))
    states = []
    for folder, stops in (("whole", ["4"]), ("parts", ["2", "4"])):
        (here / folder).mkdir()
        monkeypatch.chdir(here / folder)
        for number, stop in enumerate(stops):
            more = ["--trainer.max_steps", stop, "--trainer.precision", "bf16-mixed"]
            fit(["fit", "--config", config, *more, *(["--ckpt_path", "last"] if number else [])])
        states.append(read_checkpoint(here / folder / "checkpoints" / "last.ckpt")["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
