"""`slicemod sample`: a PNG of images drawn from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from slicemod.arguments import ArgumentParser
from slicemod.training.checkpoints import ensure_writable_folder
from slicemod.training.latent_diffusion import checkpoint_attention, load_latent_diffusion
from slicemod.training.pictures import save_tiles
from slicemod.training.sampling import Sampling, sample_images
from slicemod.user_error import UserError


def run(arguments: Sequence[str]) -> int:
    """Draws images of one class; ``arguments[0]`` is the command's name."""
    options = _parser().parse_args(arguments[1:])
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must name a .png file, got {options.out}: for example {out.with_suffix('.png')}.")
    if options.count < 1:
        raise UserError(f"--count must be at least 1, got {options.count}: say how many images to draw.")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}: give another whole number.")
    if not math.isfinite(options.guidance):
        raise UserError(f"--guidance must be a finite number, got {options.guidance}: 1 to 5 are usual.")
    model = load_latent_diffusion(
        options.checkpoint, attention=checkpoint_attention(options.checkpoint), compile=options.compile
    )
    ensure_writable_folder(out.parent)
    images = sample_images(
        model,
        torch.full((options.count,), options.label),
        Sampling(steps=options.steps, guidance=options.guidance, seed=options.seed),
        resolution=options.resolution,
    )
    save_tiles(images, out)
    print(f"{options.count} images of class {options.label}: {out}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("slicemod sample", description="Draws images of one class from a checkpoint.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN.ckpt", help="written by `slicemod fit`")
    parser.add_argument("--class", dest="label", type=int, required=True, help="the digit to draw, 0 to 9")
    parser.add_argument("--count", type=int, default=16, help="how many images (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    parser.add_argument(
        "--resolution", type=int, help="edge in pixels, such as 2 or 4 times the trained one (default: the trained one)"
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="weight of the class, 1 is no guidance (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="run the UNet under torch.compile(fullgraph=True)")
    return parser
