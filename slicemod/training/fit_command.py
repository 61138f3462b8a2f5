"""`slicemod fit` and `slicemod validate`: which model a configuration is about, and how a run ended."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import yaml

from slicemod.training.interruption import TrainingInterruptedError
from slicemod.training.lightning_cli import SlicemodCLI, config_files
from slicemod.user_error import UserError

# What the top-level key `task` of a configuration names; imported when asked for.
TASKS = {
    "digits": ("slicemod.training.digits_cli", "DigitsCLI"),
    "stable_diffusion": ("slicemod.training.stable_diffusion_cli", "StableDiffusionCLI"),
}


def run(arguments: Sequence[str]) -> int:
    """Runs `fit` or `validate`; ``arguments[0]`` says which."""
    try:
        fit(arguments)
    except TrainingInterruptedError as stop:
        print(f"slicemod {arguments[0]}: {_how_to_continue(stop, arguments)}", file=sys.stderr)
        return 128 + stop.signum  # what a shell reports for a process that a signal ended
    return 0


def fit(arguments: Sequence[str]) -> SlicemodCLI:
    """Parses, builds and runs; the trainer, the model and the data are attributes of what it returns.

    Args:
        arguments: a subcommand, `fit` or `validate`, and its options.

    Raises:
        UserError: what was given cannot be parsed, built or read.
        TrainingInterruptedError: a signal stopped the training.
    """
    task = _task(arguments)
    if task not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {task!r}. Correct the name.")
    module, name = TASKS[task]
    cli: SlicemodCLI = getattr(import_module(module), name)(arguments)
    return cli


def _task(arguments: Sequence[str]) -> str:
    """The task that the last configuration with one names: it decides which options there are to parse."""
    task = "digits"
    for file in config_files(arguments):
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
        if isinstance(content, dict):
            task = str(content.get("task") or task)  # a saved configuration of the digits holds null
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    named = [after for option, after in pairs if option == "--task"]
    named += [option.removeprefix("--task=") for option in arguments if option.startswith("--task=")]
    return named[-1] if named else task


def _how_to_continue(stop: TrainingInterruptedError, arguments: Sequence[str]) -> str:
    if stop.checkpoint is None:
        return (
            f"{stop} after step {stop.step}; no checkpoint was written: the autoencoder keeps none while it trains, and"
            " the UNet's come from slicemod.training.last_checkpoint.LastCheckpoint in trainer.callbacks."
            " Start the same command again."
        )
    again = shlex.join([*_without_checkpoint(arguments), "--ckpt_path", "last"])
    return f"{stop} after step {stop.step}. {stop.checkpoint} holds its state; continue with: slicemod {again}"


def _without_checkpoint(arguments: Sequence[str]) -> list[str]:
    kept = list(arguments)
    for place, argument in enumerate(kept):
        if argument == "--ckpt_path":
            return kept[:place] + kept[place + 2 :]
        if argument.startswith("--ckpt_path="):
            return kept[:place] + kept[place + 1 :]
    return kept
