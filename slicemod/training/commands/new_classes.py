"""Fine-tuning on two digits that the base model never saw: are they learnt, and are the others kept?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from slicemod.training.commands.fit_command import fit
from slicemod.training.commands.script import exit_status
from slicemod.training.common.last_checkpoint import last_checkpoint
from slicemod.training.common.pictures import save_digit_grid
from slicemod.training.digits.conditional_accuracy import DigitReader
from slicemod.training.digits.digit_images import NUM_CLASSES, digit_splits
from slicemod.training.digits.latent_diffusion import checkpoint_attention, load_latent_diffusion
from slicemod.training.digits.sampling import Sampling, sample_images
from slicemod.user_error import UserError

NEW = (4, 7)
OUT = Path("runs/new_classes")
BASE = ["fit", "--config", "configs/digits.yaml", "--data.left_out", str(list(NEW))]
TUNED = ["fit", "--config", "configs/digits.yaml", "--config", "configs/digits_finetune.yaml"]
SCHEDULE = "--model.lr_scheduler.init_args"
WAYS = {
    "full": ["--trainer.max_steps", "450", "--model.optimizer.init_args.lr", "2e-3",
             f"{SCHEDULE}.max_lr", "2e-3", f"{SCHEDULE}.total_steps", "450"],
    "lora": ["--config", "configs/digits_lora.yaml"],
}  # fmt: skip
PER_DIGIT = 50
SAMPLING = Sampling(steps=20, guidance=2.0, batch_size=125)


def main(arguments: Sequence[str]) -> int:
    """Trains what is missing and prints the table; ``arguments`` are the ways to fine-tune, all of them where none.

    A way whose checkpoint exists is measured again without training.
    """
    return exit_status("new_classes", lambda: run(list(arguments) or list(WAYS)), kept="what is finished is kept")


def run(ways: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Conditional accuracy of the new digits and of the old ones, for the base model and each way to fine-tune.

    Raises:
        UserError: a way is none of ``WAYS``, or a run cannot be made.
    """
    if unknown := [way for way in ways if way not in WAYS]:
        raise UserError(f"expected ways out of {', '.join(WAYS)}, got {', '.join(unknown)}: correct the name.")
    console = Console(width=118)
    base = _trained("base", BASE)
    files = {"base": base} | {way: _trained(way, [*TUNED, *WAYS[way], "--model.init_from", base]) for way in ways}
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_DIGIT)  # (500,)
    is_new = torch.isin(labels, torch.tensor(NEW))
    reader = DigitReader(digit_splits()["train"])
    found, panels = {}, {}
    for name, file in files.items():
        model = load_latent_diffusion(file, attention=checkpoint_attention(file))
        images = sample_images(model, labels, SAMPLING)
        found[name] = (
            reader.accuracy(images[is_new], labels[is_new]),
            reader.accuracy(images[~is_new], labels[~is_new]),
        )
        panels[name] = images.reshape(NUM_CLASSES, PER_DIGIT, *images.shape[1:])[:, :10]
        console.print(f"{name}: new digits {found[name][0]:.3f}, old digits {found[name][1]:.3f}")
    save_digit_grid(panels, OUT / "samples.png")
    console.print(f"new: {', '.join(map(str, NEW))}; pictures: {OUT / 'samples.png'}")
    return found


def _trained(name: str, command: Sequence[str]) -> str:
    """The run's checkpoint; trained by ``command``, with a folder of its own, where it is missing."""
    folder = OUT / name / "checkpoints"
    finished = folder / "finished.ckpt"
    if not finished.exists():
        begun = ["--ckpt_path", "last"] if (folder / "last.ckpt").exists() else []
        callback = "slicemod.training.last_checkpoint.LastCheckpoint"
        ran = fit([*command, "--run", f"{OUT.name}/{name}", "--trainer.logger", "false",
                   "--trainer.callbacks", callback, *begun])  # fmt: skip
        Path(str(last_checkpoint(ran.trainer))).rename(finished)
    return os.path.relpath(finished)
