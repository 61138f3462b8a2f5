"""`slicemod sample`: a PNG of images drawn from a checkpoint, of a digit or of prompts."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slicemod.arguments import require_folder_of
from slicemod.training.commands.sample_options import parser
from slicemod.training.common.checkpoints import read_checkpoint
from slicemod.training.common.pictures import save_tiles
from slicemod.training.digits.latent_diffusion import checkpoint_attention, load_latent_diffusion
from slicemod.training.digits.sampling import Sampling, sample_images
from slicemod.training.stable_diffusion.lightning_module import STORED, load_stable_diffusion
from slicemod.training.stable_diffusion.prompt_sampling import (
    PromptSampling,
    draw_prompts,
    encode_prompts,
    require_drawable,
)
from slicemod.training.stable_diffusion.text_encoders import tell_of_cut
from slicemod.user_error import UserError
from slicemod.whole_file import ensure_writable_folder

OF_CLASSES = ("--class",)
OF_PROMPTS = ("--prompt", "--negative-prompt", "--scheduler", "--max-tokens", "--height", "--width", "--source")


def run(arguments: Sequence[str]) -> int:
    """Draws images; ``arguments[0]`` is the command's name."""
    options = parser().parse_args(arguments[1:])
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must name a .png file, got {options.out}: for example {out.with_suffix('.png')}.")
    require_folder_of(out, "--out")
    if options.count is not None and options.count < 1:
        raise UserError(f"--count must be at least 1, got {options.count}: say how many images to draw.")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}: give another whole number.")
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise UserError(f"--guidance must be a finite number, got {options.guidance}: 1 to 8 are usual.")
    by_prompt = STORED in read_checkpoint(options.checkpoint)
    _require_options_of(options, by_prompt=by_prompt)
    ensure_writable_folder(out.parent)
    images = _of_prompt(options) if by_prompt else _of_class(options)
    save_tiles(images, out)
    what = repr(options.prompt) if by_prompt else f"class {options.label}"
    print(f"{len(images)} images of {what}: {out}")
    return 0


def _require_options_of(options: argparse.Namespace, *, by_prompt: bool) -> None:
    wanted, own = ("--prompt", OF_PROMPTS) if by_prompt else ("--class", OF_CLASSES)
    given = {name for name in (*OF_PROMPTS, *OF_CLASSES) if _value(options, name) is not None}
    if wanted not in given:
        raise UserError(f"{wanted} is missing: {options.checkpoint} draws by it. Say what to draw.")
    if foreign := sorted(given.difference(own)):
        raise UserError(
            f"{', '.join(foreign)} cannot be used: {options.checkpoint} is a model of"
            f" {'Stable Diffusion' if by_prompt else 'the digits'}, which draws by {wanted} alone. Leave it out."
        )


def _value(options: argparse.Namespace, name: str) -> object:
    return getattr(options, "label" if name == "--class" else name.removeprefix("--").replace("-", "_"))


def _of_class(options: argparse.Namespace) -> Tensor:
    model = load_latent_diffusion(
        options.checkpoint, attention=checkpoint_attention(options.checkpoint), compile=options.compile
    )
    return sample_images(
        model,
        torch.full((options.count or 16,), options.label),
        Sampling(
            steps=options.steps, guidance=2.0 if options.guidance is None else options.guidance, seed=options.seed
        ),
        resolution=options.resolution,
    )


def _of_prompt(options: argparse.Namespace) -> Tensor:
    model = load_stable_diffusion(options.checkpoint, source=options.source, max_tokens=options.max_tokens)
    edge = model.native_resolution if options.resolution is None else options.resolution
    height = edge if options.height is None else options.height
    width = edge if options.width is None else options.width
    how = PromptSampling(
        height,
        width,
        options.steps,
        7.0 if options.guidance is None else options.guidance,
        options.seed,
        options.scheduler,
    )
    require_drawable(model, how)
    prompts = [text for text in (options.prompt, options.negative_prompt) if text is not None]
    if told := tell_of_cut(model.stages.text_encoders, prompts, "prompts"):
        print(told, file=sys.stderr)
    encoded = encode_prompts(model, [options.prompt], options.negative_prompt)
    if options.compile:
        model.unet.compile(fullgraph=True)
    return draw_prompts(
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        encoded * (options.count or 1),
        how,
    )
