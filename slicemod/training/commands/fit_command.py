"""`slicemod fit` and `slicemod validate`: which model a configuration is about, and how a run ended."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from slicemod.training.commands.fit_options import nothing_named
from slicemod.training.common.stop_signals import TrainingInterruptedError, stop_at_once
from slicemod.training.common.yaml_files import config_files, options, read_configs
from slicemod.user_error import UserError

if TYPE_CHECKING:
    from slicemod.training.common.lightning_cli import SlicemodCLI

# What the top-level key `task` of a configuration names; imported when asked for.
TASKS = {
    "digits": ("slicemod.training.digits.digits_cli", "DigitsCLI"),
    "stable_diffusion": ("slicemod.training.stable_diffusion.stable_diffusion_cli", "StableDiffusionCLI"),
}
ANSWERED_BY_THE_PARSER = ("-h", "--help", "--print_config")


def run(arguments: Sequence[str]) -> int:
    """Runs `fit` or `validate`; ``arguments[0]`` says which.

    Raises:
        UserError: nothing says what to train, or what was given cannot be used.
    """
    if not _says_what(arguments):
        raise UserError(nothing_named(arguments[0]))
    try:
        with stop_at_once():
            fit(arguments)
    except TrainingInterruptedError as stop:
        print(f"slicemod {arguments[0]}: {_how_to_continue(stop, arguments)}", file=sys.stderr)
        return 128 + stop.signum  # what a shell reports for a process that a signal ended
    return 0


def load(arguments: Sequence[str]) -> None:
    """Imports what `run` will need, so that the caller says what that import goes without."""
    if _says_what(arguments):
        _class_of(_task(arguments))


def fit(arguments: Sequence[str]) -> SlicemodCLI:
    """Parses, builds and runs; the trainer, the model and the data are attributes of what it returns.

    Args:
        arguments: a subcommand, `fit` or `validate`, and its options.

    Raises:
        UserError: what was given cannot be parsed, built or read.
        TrainingInterruptedError: a signal stopped the training.
    """
    return _class_of(_task(arguments))(arguments)


def _class_of(task: str) -> Callable[[Sequence[str]], SlicemodCLI]:
    if task not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {task!r}. Correct the name.")
    module, name = TASKS[task]
    kind: Callable[[Sequence[str]], SlicemodCLI] = getattr(import_module(module), name)
    return kind


def _says_what(arguments: Sequence[str]) -> bool:
    named = config_files(arguments) or options(arguments, "--task")
    return bool(named) or any(argument.partition("=")[0] in ANSWERED_BY_THE_PARSER for argument in arguments)


def _task(arguments: Sequence[str]) -> str:
    """The task that the last configuration with one names: it decides which options there are to parse."""
    files = config_files(arguments)
    named = [str(content.get("task") or "") for content in (read_configs([file]) for file in files)]
    named += options(arguments, "--task")
    return next((task for task in reversed(named) if task), "digits")  # a saved configuration of the digits holds null


def _how_to_continue(stop: TrainingInterruptedError, arguments: Sequence[str]) -> str:
    kept = f" {stop.kept}" if stop.kept else ""
    if stop.checkpoint is None and stop.step == 0:
        return f"{stop} before the first step.{kept} Start the same command again."
    if stop.checkpoint is None:
        return (
            f"{stop} after step {stop.step}; no checkpoint was written: the autoencoder keeps none while it trains, and"
            " the UNet's come from slicemod.training.last_checkpoint.LastCheckpoint in trainer.callbacks."
            " Start the same command again."
        )
    again = shlex.join([*_without_checkpoint(arguments), "--ckpt_path", "last"])
    holds = "holds its state" if stop.between_steps else "is the last checkpoint"
    return f"{stop} after step {stop.step}. {stop.checkpoint} {holds}; continue with: slicemod {again}"


def _without_checkpoint(arguments: Sequence[str]) -> list[str]:
    kept = list(arguments)
    for place, argument in enumerate(kept):
        if argument == "--ckpt_path":
            return kept[:place] + kept[place + 2 :]
        if argument.startswith("--ckpt_path="):
            return kept[:place] + kept[place + 1 :]
    return kept
