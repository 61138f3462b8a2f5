"""The parts of a pipeline are found, and what is not known is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slicemod.planning.autoencoders import AutoencoderSource
from slicemod.planning.picture_model import NAMED_PARTS, find_picture_model
from slicemod.planning.picture_parts import left_whole
from slicemod.planning.plan_options import MODELS
from slicemod.planning.prompt_encoders import KnownEncoder
from slicemod.user_error import UserError


def write_pipeline(folder: Path, **classes: list[str | None]) -> str:
    """A pipeline's folder with configs alone."""
    parts: dict[str, tuple[str, dict[str, Any]]] = {
        "unet": ("UNet2DConditionModel", {"cross_attention_dim": 24}),
        "vae": ("AutoencoderKL", {"block_out_channels": [4, 8]}),
    }
    for name, (kind, config) in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", ""], "vae": ["diffusers", ""], **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def write_encoder(folder: Path, **config: Any) -> None:
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "latent_channels", "parameters"),
    [
        ("sd15", 4, 83_653_863),
        ("flux-dev", 16, 83_819_683),
        ("qwen-image", 16, 126_892_531),
        ("wan-14b", 16, 126_892_531),
    ],
)
def test_named_models_have_the_autoencoder_that_was_published(name: str, latent_channels: int, parameters: int) -> None:
    autoencoder = find_picture_model(name).autoencoder
    built = autoencoder.model(torch.float32)
    assert sum(tensor.numel() for tensor in built.parameters()) == parameters
    assert autoencoder.inputs(built, torch.float32, 1, 256)["z"].shape[1] == latent_channels


def test_every_named_model_has_its_parts() -> None:
    assert set(NAMED_PARTS) == set(MODELS)
    for name in MODELS:
        model = find_picture_model(name)
        assert model.denoiser.latent_pixels == model.autoencoder.latent_pixels == 8, name
        assert all(isinstance(encoder, KnownEncoder) for encoder in model.encoders)
        assert model.denoiser.frames == model.autoencoder.frames == (81 if name.startswith("wan") else 1)


def test_sdxl_alone_decodes_in_float32_where_the_model_is_in_float16() -> None:
    sd15, sdxl = find_picture_model("sd15"), find_picture_model("sdxl")
    assert sdxl.autoencoder_dtype(torch.float16) == torch.float32
    assert sdxl.autoencoder_dtype(torch.bfloat16) == torch.bfloat16
    assert sd15.autoencoder_dtype(torch.float16) == torch.float16


def test_a_pipelines_folder_has_its_own_parts_and_names_what_is_not_counted(tmp_path: Path) -> None:
    folder = write_pipeline(
        tmp_path / "pipeline",
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        scheduler=["diffusers", "DDIMScheduler"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        image_encoder=[None, None],
    )
    write_encoder(tmp_path / "pipeline", hidden_size=24, max_position_embeddings=11)
    model = find_picture_model(folder)
    assert model.left_out == ("safety_checker",)
    assert model.autoencoder == AutoencoderSource("AutoencoderKL", {"block_out_channels": [4, 8]})
    (encoder,) = model.encoders
    assert (encoder.class_name, encoder.tokens) == ("CLIPTextModel", 11)  # type: ignore[union-attr]
    assert find_picture_model(f"{folder}/unet") == model


def test_a_text_encoder_whose_inputs_are_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline", text_encoder=["transformers", "GemmaModel"])
    write_encoder(tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"text_encoder/config.json: expected .*T5EncoderModel.*got one of GemmaModel"):
        find_picture_model(folder)


def test_an_autoencoder_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = Path(write_pipeline(tmp_path / "pipeline"))
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(UserError, match=r"expected .*AutoencoderKLWan.*got one of AutoencoderDC"):
        find_picture_model(str(folder))


@pytest.mark.parametrize(
    ("kind", "latent_pixels"), [("AutoencoderKL", 1), ("AutoencoderKLWan", 8), ("AutoencoderKLQwenImage", 8)]
)
def test_an_autoencoder_that_does_not_list_its_levels_has_those_of_its_class(
    kind: str, latent_pixels: int, tmp_path: Path
) -> None:
    folder = Path(write_pipeline(tmp_path / "pipeline"))
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": kind}))
    model = find_picture_model(str(folder))
    assert model.denoiser.latent_pixels == model.autoencoder.latent_pixels == latent_pixels


@pytest.mark.parametrize("missing", ["vae/config.json", "model_index.json"])
def test_a_folder_without_the_other_parts_is_refused(missing: str, tmp_path: Path) -> None:
    folder = Path(write_pipeline(tmp_path / "pipeline"))
    (folder / missing).unlink()
    with pytest.raises(UserError, match=r"expected the folder of a pipeline, with .*--part unet"):
        find_picture_model(str(folder))


def test_a_yaml_of_configs_has_its_autoencoder_and_no_text_encoder() -> None:
    model = find_picture_model("configs/digits.yaml")
    assert model.autoencoder.latent_pixels == model.denoiser.latent_pixels == 4
    assert model.encoders == ()


def test_what_is_not_in_slices_is_said() -> None:
    assert list(left_whole(find_picture_model("sd15"))) == []
    (feed_forwards,) = left_whole(find_picture_model("flux-dev"))
    assert "feed-forwards are planned as they are" in feed_forwards
    _, vae = left_whole(find_picture_model("wan-1.3b"))
    assert vae == "slicemod: the VAE, an AutoencoderKLWan, is planned as it is. swap_vae does not slice it"
