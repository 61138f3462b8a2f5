"""`slicemod export`: a checkpoint as other programs read it."""

from __future__ import annotations

import argparse
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

from slicemod import restore_attention
from slicemod.arguments import require_folder_of
from slicemod.call import dtype_name
from slicemod.planning.config_json import read_config
from slicemod.training.commands.export_options import parser
from slicemod.training.common.checkpoints import read_checkpoint, read_safetensors, write_safetensors
from slicemod.training.common.whole_folder import whole_folder
from slicemod.training.digits.latent_diffusion import load_latent_diffusion
from slicemod.training.stable_diffusion.compvis_layout import (
    UNET,
    autoencoder_to_compvis,
    text_encoders_to_compvis,
    unet_to_compvis,
)
from slicemod.training.stable_diffusion.file_metadata import lora_metadata, model_metadata
from slicemod.training.stable_diffusion.lightning_module import (
    STORED,
    StableDiffusion,
    load_stable_diffusion,
    stored_settings,
)
from slicemod.training.stable_diffusion.lora_file import write_lora
from slicemod.training.stable_diffusion.samplers import own_sampler_obstacle
from slicemod.user_error import UserError


def run(arguments: Sequence[str]) -> int:
    """Writes the files; ``arguments[0]`` is the command's name."""
    options = parser().parse_args(arguments[1:])
    checkpoint = read_checkpoint(options.checkpoint)
    out = Path(options.out)
    dtype: torch.dtype = getattr(torch, options.dtype)
    if STORED not in checkpoint:
        if options.format != "diffusers":
            raise UserError(
                f"--format: a model of the digits is exported as diffusers alone, got {options.format}. Leave it out."
            )
        with whole_folder(out) as folder:
            _export_digits(options.checkpoint, folder)
        print(f"unet, vae, scheduler and class_embedder.safetensors: {out}")
        return 0
    settings, step = stored_settings(checkpoint, options.checkpoint), checkpoint["global_step"]
    if options.format != "diffusers":
        require_folder_of(out, "--out")
    if options.format == "diffusers":
        with whole_folder(out) as folder:
            model = _merged(options)
            _export_folder(model, folder, dtype)
        if obstacle := own_sampler_obstacle(model.pretrained.scheduler_config(), model.scheduler_changes):
            print(f"scheduler: DDIMScheduler, since {obstacle}")
    elif out.suffix != ".safetensors":
        raise UserError(f"--out must name a .safetensors file, got {out}: for example {out}.safetensors.")
    elif options.format == "lora":
        state = _cast(checkpoint["state_dict"], dtype)
        write_lora(out, state, settings["lora"], lora_metadata(settings, step, out.stem))
    else:
        model = _merged(options)
        edge = model.native_resolution
        write_safetensors(out, _cast(_compvis(model), dtype), model_metadata(settings, step, out.stem, edge))
    print(f"{options.format} of step {step}: {out}")
    return 0


def _export_digits(path: str, out: Path) -> None:
    model = load_latent_diffusion(path, attention=None)
    model.unet.save_pretrained(out / "unet")
    model.autoencoder.save_pretrained(out / "vae")
    model.scheduler.save_pretrained(out / "scheduler")
    save_file(model.class_embedder.state_dict(), out / "class_embedder.safetensors")


def _merged(options: argparse.Namespace) -> StableDiffusion:
    """The model with adapters added to the source's own weights, whatever it was trained beside."""
    model = load_stable_diffusion(options.checkpoint, source=options.source, frozen_dtype="float32")
    if model.trained == "lora":
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
    _in(model.unet, dtype).save_pretrained(out / "unet")
    _in(model.pretrained.load_autoencoder(), dtype).save_pretrained(out / "vae")
    scheduler = model.sampling_scheduler()
    scheduler.save_pretrained(out / "scheduler")
    folder = _folder(model.pretrained.config_folder, parts)
    for part in parts:
        if model.pretrained.is_single_file and part.startswith("text_encoder"):
            encoders: Any = model.stages.text_encoders
            _in(encoders.encoders[list(parts).index(part) // 2], dtype).save_pretrained(out / part)
        elif (folder / part).is_dir():
            _copy_part(folder / part, out / part, dtype)
        else:
            raise UserError(
                f"model.source: expected {part}/ in {folder}, found none: the export would not be a whole pipeline."
                " Name the folder by --source."
            )
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if model.is_sdxl else "StableDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{part: ["transformers", kind] for part, kind in parts.items()},
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if model.is_sdxl:
        index |= {"force_zeros_for_empty_prompt": model.zeroes_missing_text}
    else:
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


def _copy_part(source: Path, out: Path, dtype: torch.dtype) -> None:
    """A vocabulary or a text encoder: its small files, and its weights in ``dtype``."""
    out.mkdir()
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, out)
    if source.name.startswith("text_encoder"):
        tensors, metadata = read_safetensors(source / "model.safetensors")
        write_safetensors(out / "model.safetensors", _cast(tensors, dtype), metadata)
    config = out / "config.json"
    if config.exists():  # a text encoder's, which tells the dtype
        settings = read_config(source / "config.json")
        named = {key: dtype_name(dtype) for key in ("dtype", "torch_dtype") if key in settings}
        config.write_text(json.dumps(settings | named, indent=2) + "\n", encoding="utf-8")


def _in(module: Any, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(module, dtype)  # diffusers' own warns of layers that it has not


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In another dtype; whole numbers, such as the places of tokens, stay as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
