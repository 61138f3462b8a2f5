"""The main job: autoencoder, base training, fine-tuning with swapped attention, samples, measurements."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slicemod import SliceConfig, SlicePlan
from slicemod.memory.sizes import size_text
from slicemod.training.commands.fit_command import fit
from slicemod.training.commands.script import exit_status
from slicemod.training.common.last_checkpoint import last_checkpoint
from slicemod.training.common.lightning_cli import SlicemodCLI
from slicemod.training.common.pictures import read_metric, save_digit_grid, save_loss_curve
from slicemod.training.common.run_folder import unused_name
from slicemod.training.digits.conditional_accuracy import DigitReader
from slicemod.training.digits.digit_images import DigitsDataModule
from slicemod.training.digits.latent_diffusion import LatentDiffusion, load_latent_diffusion
from slicemod.training.digits.sampling import Sampling, sample_images
from slicemod.training.digits.step_memory import StepMemory, measure_training_steps
from slicemod.user_error import UserError

BASE = ["fit", "--config", "configs/digits.yaml", "--attention", "null"]
FINETUNE = ["fit", "--config", "configs/digits.yaml", "--config", "configs/digits_finetune.yaml"]
OUT = Path("runs/demo")
PER_DIGIT, SHOWN_PER_DIGIT = 50, 10  # generated to be read by the classifier; drawn in the grid
SAMPLING = Sampling(steps=20, guidance=2.0, batch_size=125)
SIZES = ((32, 64), (512, 1))  # pixels and batch of the measured training steps
ROUNDING = 1e-5  # relative: some hundred float32 roundings of 6e-8 between two orders of summation
Result = TypeVar("Result")


class DemoError(UserError):
    """The demo found that something that must hold does not."""


def main() -> int:
    """Runs the whole demo in the current folder, the root of a clone; returns the exit status."""
    torch.set_float32_matmul_precision("highest")
    return exit_status("demo", _run, kept="the autoencoder is kept once it is trained")


def _run() -> None:
    console = Console(record=True, width=118)
    stages: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Result]) -> Result:
        console.rule(f"[bold]{name}")
        start = time.perf_counter()
        result = work()
        stages[name] = time.perf_counter() - start
        return result

    base = timed(
        "autoencoder and base training, the UNet's own attention", lambda: fit([*BASE, "--run", unused_name("digits")])
    )
    base_file = _finished(base)
    tuning = [*FINETUNE, "--model.init_from", base_file, "--run", unused_name("digits_finetune")]
    tuned = timed("fine-tuning, attention swapped by the config", lambda: fit(tuning))
    tuned_file = _finished(tuned)
    console.print(f"first loss: {_compare_first_losses(tuned, base_file)}")
    slicing = tuned.model.attention
    models = {
        "base": load_latent_diffusion(base_file, attention=None),
        "fine-tuned": load_latent_diffusion(tuned_file, attention=slicing),
    }
    labels = torch.arange(10).repeat_interleave(PER_DIGIT)  # (500,)
    samples = timed("sampling", lambda: {name: _sample(name, model, labels, console) for name, model in models.items()})
    _draw(samples, {"base": _log(base), "fine-tuned": _log(tuned)})
    measured = timed("memory of a training step", lambda: _measure(base_file, slicing, console))
    console.rule("[bold]results")
    for steps in measured:
        console.print(_plan_table([step for step in steps if step.plans]))
    for steps in measured:
        console.print(_memory_table(steps))
    console.print(f"autoencoder: {base.config.fit.autoencoder_training.weights}")
    console.print(f"checkpoints: {base_file} (base), {tuned_file} (fine-tuned)")
    console.print(f"pictures: {OUT / 'samples.png'}, {OUT / 'loss.png'}")
    _print_accuracies(samples, labels, base.datamodule, console)
    console.print("; ".join(f"{name}: {seconds:.0f} s" for name, seconds in stages.items()), style="dim")
    console.save_text(str(OUT / "report.txt"))


def _finished(run: SlicemodCLI) -> str:
    path = last_checkpoint(run.trainer)
    if path is None:
        raise DemoError("the training wrote no checkpoint: expected LastCheckpoint in its config.")
    return os.path.relpath(path)


def _log(run: SlicemodCLI) -> Path:
    return Path(str(run.trainer.log_dir)) / "metrics.csv"


def _compare_first_losses(tuned: SlicemodCLI, base_file: str) -> str:
    """The fine-tuning run's first logged loss against the base model's on the same batch and noise."""
    data: DigitsDataModule = tuned.datamodule
    model = load_latent_diffusion(base_file, attention=None)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        latents = model.encode(data.split("train").images)[batch["index"]]
        base = float(model.diffusion_loss(latents, batch["label"], tuned.model.batch_seed(batch)))
    swapped = read_metric(_log(tuned), "train/loss")[0][1]
    difference = abs(swapped - base)
    found = f"base {base:.8f}, swapped {swapped:.8f}, difference {difference:.1e}"
    if difference > ROUNDING * abs(base):
        raise DemoError(
            f"the swapped UNet does not start from the base's loss: expected equality within {ROUNDING:.0e}"
            f" relative, got {found}."
        )
    return found


def _sample(name: str, model: LatentDiffusion, labels: Tensor, console: Console) -> Tensor:
    console.print(f"{len(labels)} digits, {name}: {SAMPLING.steps} DDIM steps, guidance {SAMPLING.guidance:g}")
    return sample_images(model, labels, SAMPLING)


def _draw(samples: dict[str, Tensor], logs: dict[str, Path]) -> None:
    panels = {
        title: images.reshape(10, PER_DIGIT, *images.shape[1:])[:, :SHOWN_PER_DIGIT]  # (10, C, 1, S, S)
        for title, images in samples.items()
    }
    save_digit_grid(panels, OUT / "samples.png")
    save_loss_curve(logs, OUT / "loss.png")


def _measure(base_file: str, slicing: SliceConfig, console: Console) -> list[list[StepMemory]]:
    measured = []
    for resolution, batch in SIZES:
        console.print(f"{resolution}x{resolution} pixels, batch {batch}")
        model = load_latent_diffusion(base_file, attention=None).train()
        measured.append(measure_training_steps(model, slicing, resolution, batch))
    return measured


def _plan_table(steps: list[StepMemory]) -> Table:
    """Every layer's plan, the measured ways to slice side by side."""
    size = f"{steps[0].resolution}x{steps[0].resolution}"
    table = Table(title=f"plans of a training step at {size} pixels", title_justify="left", box=SIMPLE)
    table.add_column("attention layer")
    for step in steps:
        table.add_column(step.attention.replace("(", "\n("), no_wrap=True)
    for layer in steps[0].plans:
        table.add_row(layer.replace("transformer_blocks.", ""), *(_plan(step.plans[layer]) for step in steps))
    return table


def _plan(plan: SlicePlan) -> str:
    steps = f"{plan.steps} step{'s' if plan.steps > 1 else ''}"
    return f"{plan.kernel}, {plan.axis}, {steps}, {size_text(plan.peak_bytes)}"


def _memory_table(steps: list[StepMemory]) -> Table:
    size = f"{steps[0].resolution}x{steps[0].resolution} pixels, batch {steps[0].batch}"
    table = Table(title=f"measured peak memory of a training step, {size}", title_justify="left", box=SIMPLE)
    for column in ("attention", "peak", "one noisy time"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for step in steps:
        table.add_row(step.attention, size_text(step.peak_bytes), f"{step.seconds:.2f} s")
    return table


def _print_accuracies(samples: dict[str, Tensor], labels: Tensor, data: DigitsDataModule, console: Console) -> None:
    reader = DigitReader(data.split("train"))
    real = reader.accuracy(*data.split("test"))
    console.print(f"the classifier reads {real:.3f} of the real test digits correctly")
    for name, images in samples.items():
        console.print(f"conditional accuracy: {reader.accuracy(images, labels):.3f} ({name})")


if __name__ == "__main__":
    sys.exit(main())
