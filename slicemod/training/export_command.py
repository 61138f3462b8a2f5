"""`slicemod export`: the parts of a checkpoint in diffusers' folder layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from slicemod.arguments import ArgumentParser
from slicemod.training.checkpoints import ensure_writable_folder
from slicemod.training.latent_diffusion import load_latent_diffusion
from slicemod.user_error import UserError


def run(arguments: Sequence[str]) -> int:
    """Writes ``unet/``, ``vae/``, ``scheduler/`` and ``class_embedder.safetensors`` into a new folder."""
    parser = ArgumentParser(
        "slicemod export", description="Writes a checkpoint's UNet, autoencoder and scheduler for diffusers."
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN.ckpt", help="written by `slicemod fit`")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a folder that is missing or empty")
    options = parser.parse_args(arguments[1:])
    model = load_latent_diffusion(options.checkpoint, attention=None)
    out = Path(options.out)
    ensure_writable_folder(out)
    if any(out.iterdir()):
        raise UserError(f"--out must be a folder that is missing or empty, got {out} with files in it: name another.")
    model.unet.save_pretrained(out / "unet")
    model.autoencoder.save_pretrained(out / "vae")
    model.scheduler.save_pretrained(out / "scheduler")
    save_file(model.class_embedder.state_dict(), out / "class_embedder.safetensors")
    print(f"unet, vae, scheduler and class_embedder.safetensors: {out}")
    return 0
