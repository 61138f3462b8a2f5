"""`slicemod export`: a checkpoint as other programs read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from slicemod import __version__, restore_attention
from slicemod.arguments import ArgumentParser
from slicemod.training.checkpoints import ensure_writable_folder, read_checkpoint, read_safetensors, write_safetensors
from slicemod.training.compvis_layout import UNET, autoencoder_to_compvis, text_encoders_to_compvis, unet_to_compvis
from slicemod.training.latent_diffusion import load_latent_diffusion
from slicemod.training.lora_file import write_lora
from slicemod.training.stable_diffusion import STORED, StableDiffusion, load_stable_diffusion, stored_settings
from slicemod.user_error import UserError

FORMATS = ("diffusers", "compvis", "lora")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(arguments: Sequence[str]) -> int:
    """Writes the files; ``arguments[0]`` is the command's name."""
    options = _parser().parse_args(arguments[1:])
    checkpoint = read_checkpoint(options.checkpoint)
    out = Path(options.out)
    if STORED not in checkpoint:
        if options.format != "diffusers":
            raise UserError(
                f"--format: a model of the digits is exported as diffusers alone, got {options.format}. Leave it out."
            )
        _export_digits(options.checkpoint, _empty_folder(out))
        print(f"unet, vae, scheduler and class_embedder.safetensors: {out}")
        return 0
    if options.format == "diffusers":
        model = _merged(load_stable_diffusion(options.checkpoint, source=options.source))
        _export_folder(model, _empty_folder(out), DTYPES[options.dtype])
    else:
        if out.suffix != ".safetensors":
            raise UserError(f"--out must name a .safetensors file, got {out}: for example {out}.safetensors.")
        settings = stored_settings(checkpoint, options.checkpoint)
        if options.format == "lora":
            write_lora(
                out,
                {name: tensor.to(DTYPES[options.dtype]) for name, tensor in checkpoint["state_dict"].items()},
                settings["lora"],
                _metadata(settings, checkpoint["global_step"]),
            )
        else:
            model = _merged(load_stable_diffusion(options.checkpoint, source=options.source))
            tensors = {name: tensor.to(DTYPES[options.dtype]) for name, tensor in _compvis(model).items()}
            write_safetensors(out, tensors, _metadata(settings, checkpoint["global_step"]))
    print(f"{options.format} of step {checkpoint['global_step']}: {out}")
    return 0


def _export_digits(path: str, out: Path) -> None:
    model = load_latent_diffusion(path, attention=None)
    model.unet.save_pretrained(out / "unet")
    model.autoencoder.save_pretrained(out / "vae")
    model.scheduler.save_pretrained(out / "scheduler")
    save_file(model.class_embedder.state_dict(), out / "class_embedder.safetensors")


def _merged(model: StableDiffusion) -> StableDiffusion:
    """The model with adapters added to the weights that they adapt, and with its own attention."""
    if model.trained == "lora":
        model.unet.float()
        model.unet.fuse_lora()
        model.unet.unload_lora()
    if model.attention is not None:
        restore_attention(model.unet)
    return model


def _export_folder(model: StableDiffusion, out: Path, dtype: torch.dtype) -> None:
    """All parts of a pipeline: the trained UNet, and what it was trained between from where it came from."""
    parts = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    if model.is_sdxl:
        parts |= {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
    model.unet.to(dtype).save_pretrained(out / "unet")
    model.pretrained.load_autoencoder().to(dtype=dtype).save_pretrained(out / "vae")
    model.sampling_scheduler().save_pretrained(out / "scheduler")
    folder = _folder(model.pretrained.config_folder, parts)
    for part in parts:
        if model.pretrained.is_single_file and part.startswith("text_encoder"):
            place = list(parts).index(part) // 2
            model.stages.text_encoders.encoders[place].save_pretrained(out / part)  # type: ignore[attr-defined]
        elif (folder / part).is_dir():
            shutil.copytree(folder / part, out / part)
        else:
            raise UserError(
                f"model.source: expected {part}/ in {folder}, found none: the export would not be a whole pipeline."
                " Name the folder by --source."
            )
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if model.is_sdxl else "StableDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", type(model.sampling_scheduler()).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{part: ["transformers", kind] for part, kind in parts.items()},
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not model.is_sdxl:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _compvis(model: StableDiffusion) -> dict[str, Tensor]:
    """One file's tensors; autoencoder and text encoders as they were in the single file that the run began from."""
    unet = unet_to_compvis(model.unet.state_dict(), model.unet.config)
    if model.pretrained.is_single_file:
        kept = {name: tensor for name, tensor in model.pretrained.tensors.items() if not name.startswith(UNET)}
        return {name: tensor for name, tensor in kept.items() if not name.startswith("model_ema.")} | unet
    autoencoder = model.pretrained.load_autoencoder()
    parts = ["text_encoder", *(["text_encoder_2"] if model.is_sdxl else [])]
    folder = _folder(model.pretrained.source, parts)
    texts = [read_safetensors(folder / part / "model.safetensors")[0] for part in parts]
    # SD2.x's text encoder is open_clip's, whose embeddings are wider than SD1.x's
    openclip = bool(model.unet.config.use_linear_projection)
    return (
        unet
        | autoencoder_to_compvis(autoencoder.state_dict(), autoencoder.config)
        | text_encoders_to_compvis(texts, openclip=openclip)
    )


def _folder(source: str, parts: Sequence[str] | Mapping[str, str]) -> Path:
    """The source as a folder on this machine; of a hub id only ``parts`` are fetched, where they are not yet."""
    if Path(source).is_dir():
        return Path(source)
    patterns = [f"{part}/*{end}" for part in parts for end in (".json", ".txt", ".safetensors")]
    return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))


def _metadata(settings: Mapping[str, Any], step: int) -> dict[str, str]:
    config = settings["unet"]
    kind = "stable-diffusion-xl-v1-base" if config.get("addition_embed_type") == "text_time" else "stable-diffusion-v1"
    if kind.endswith("v1") and config.get("use_linear_projection"):
        kind = (
            "stable-diffusion-v2-768-v" if settings["prediction_type"] == "v_prediction" else "stable-diffusion-v2-512"
        )
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{kind}/lora" if settings["trained"] == "lora" else kind,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if settings["prediction_type"] == "v_prediction" else "epsilon",
        "slicemod.version": __version__,
        "slicemod.source": settings["source"],
        "slicemod.trained": settings["trained"],
        "slicemod.step": str(step),
    }


def _empty_folder(out: Path) -> Path:
    ensure_writable_folder(out)
    if any(out.iterdir()):
        raise UserError(f"--out must be a folder that is missing or empty, got {out} with files in it: name another.")
    return out


def _parser() -> ArgumentParser:
    parser = ArgumentParser("slicemod export", description="Writes a checkpoint as other programs read it.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN.ckpt", help="written by `slicemod fit`")
    parser.add_argument(
        "--out", required=True, metavar="PLACE", help="a folder that is missing or empty, or a .safetensors file"
    )
    parser.add_argument(
        "--format",
        default="diffusers",
        choices=FORMATS,
        help="a diffusers folder, one file in CompVis' and sgm's layout, or the low-rank adapters alone as diffusers"
        " and webuis read them (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="default: %(default)s")
    parser.add_argument("--source", help="where the model that the run began from lies now")
    return parser
