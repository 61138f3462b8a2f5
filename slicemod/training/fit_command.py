"""`slicemod fit` and `slicemod validate`: a LightningCLI over ``LatentDiffusion`` and the digits."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import lightning.pytorch as pl
from diffusers import AutoencoderKL
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from slicemod import SliceConfig
from slicemod.plan import POLICIES
from slicemod.slice_config import KERNELS
from slicemod.training.autoencoder import AutoencoderTraining, load_autoencoder, train_autoencoder
from slicemod.training.checkpoints import CheckpointError, ensure_writable_folder, load_strictly, read_checkpoint
from slicemod.training.digits import DigitsDataModule
from slicemod.training.interruption import StopBetweenSteps, TrainingInterruptedError
from slicemod.training.last_checkpoint import last_checkpoint
from slicemod.training.latent_diffusion import LatentDiffusion, stored_components
from slicemod.user_error import UserError


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
    _widen_tuples(AutoencoderKL)
    _silence_known_warnings()
    try:
        return SlicemodCLI(
            LatentDiffusion,
            DigitsDataModule,
            trainer_defaults={"callbacks": [StopBetweenSteps()]},
            save_config_callback=SaveConfigBesideLogs,
            auto_configure_optimizers=False,  # they are arguments of the model, whose schedule steps every step
            load_from_checkpoint_support=False,  # LatentDiffusion stores its components itself
            args=list(arguments),
        )
    except (ArgumentError, argparse.ArgumentError) as error:
        files = ", ".join(_config_files(arguments)) or "no file"
        raise UserError(f"{_readable(str(error))} (configuration from {files} and the command line)") from error
    except MisconfigurationException as error:
        raise UserError(f"Lightning cannot run this configuration: {error}") from error


class SaveConfigBesideLogs(SaveConfigCallback):
    """Saves the resolved configuration beside the logs, and none where there are none to be beside."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Saves it."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class SlicemodCLI(LightningCLI):
    """LightningCLI with the top-level blocks ``attention`` and ``autoencoder_training``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`; ``weights_only`` is no option because no checkpoint is read without it."""
        skipped = {"model", "datamodule", "weights_only"}
        return {
            "fit": skipped | {"train_dataloaders", "val_dataloaders"},
            "validate": skipped | {"dataloaders"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises instead of printing its usage and exiting."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the two top-level blocks and hands them to the model."""
        parser.add_argument(
            "--attention",
            type=SliceConfig | None,
            default=None,
            help="How the UNet's attention is sliced; null or leaving it out keeps the UNet's own attention.",
        )
        parser.link_arguments("attention", "model.attention")
        parser.add_class_arguments(AutoencoderTraining, "autoencoder_training")
        parser.link_arguments("autoencoder_training.weights", "model.autoencoder_weights")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses ``args`` alone: Lightning's own method warns where ``sys.argv`` holds anything besides."""
        self.config = parser.parse_args(cast("Sequence[str]", args))

    def _parse_ckpt_path(self) -> None:
        """Replaces Lightning's, which reads hyperparameters that these checkpoints do not have, errors unhandled."""

    def before_instantiate_classes(self) -> None:
        """Checks the attention block by itself: jsonargparse buries its error under the types it tried besides."""
        block = self._get(self.config, "attention")
        if block is not None:
            try:
                given = block.as_dict()
                SliceConfig(**given.get("init_args", given))
            except ValueError as error:
                raise UserError(f"The configuration's block attention cannot be used: {error}") from error

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer.

        Raises:
            UserError: a value has the right type but cannot be used.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(
                f"The configuration cannot be built: {error}. Correct the init_args of model or trainer that this is"
                " about; configs/digits.yaml is an example that works."
            ) from error

    def _set_seed(self) -> None:
        """Seeds everything.

        Raises:
            UserError: the seed is out of range.
        """
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: expected a whole number from 0 to 4294967295; {error}.") from error

    def before_fit(self) -> None:
        """Checks everything that can be wrong, then trains the autoencoder if its weights do not exist yet."""
        self._require_matching_sizes()
        options: Namespace = self.config_init["fit"]
        if options.get("ckpt_path") is not None:
            options["ckpt_path"] = self._readable_checkpoint(options["ckpt_path"])
        elif self.model.init_from is not None:
            self.model.load_weights(self.model.init_from)
        training: AutoencoderTraining = options["autoencoder_training"]
        trained = Path(training.weights).exists()
        if trained:
            load_autoencoder(self.model.autoencoder, training.weights)
        self._require_writable_folders()
        continued = options.get("ckpt_path") is not None or self.model.init_from is not None
        if not continued and not trained:
            print(f"{training.weights} does not exist yet: training the autoencoder first.")
            psnr = train_autoencoder(self.model.autoencoder, self.datamodule, training)
            self.model.autoencoder.eval().requires_grad_(False)
            print(f"autoencoder PSNR {psnr:.2f} dB on the validation split: {training.weights}")

    def before_validate(self) -> None:
        """Checks the checkpoint, without which there is nothing to measure."""
        options: Namespace = self.config_init["validate"]
        if options.get("ckpt_path") is None:
            raise UserError("--ckpt_path is missing: expected the checkpoint to validate, written by `slicemod fit`.")
        self._require_matching_sizes()
        options["ckpt_path"] = self._readable_checkpoint(options["ckpt_path"])
        self._require_writable_folders()

    def fit(self, **kwargs: Any) -> None:
        """``Trainer.fit`` that says what an interrupted run continues from."""
        if self.model.swap_report is not None:
            print(self.model.swap_report)
        try:
            self.trainer.fit(**kwargs, weights_only=True)
        except TrainingInterruptedError as stop:
            stop.checkpoint = last_checkpoint(self.trainer)
            raise

    def validate(self, **kwargs: Any) -> None:
        """``Trainer.validate`` that unpickles no code."""
        self.trainer.validate(**kwargs, weights_only=True)

    def _require_matching_sizes(self) -> None:
        if self.datamodule.image_size != self.model.trained_resolution:
            raise UserError(
                f"data.image_size must be {self.model.trained_resolution}, model.unet.init_args.sample_size"
                f" ({self.model.unet.config.sample_size} latents) times the autoencoder's"
                f" {self.model.pixels_per_latent} pixels a latent, got {self.datamodule.image_size}:"
                " change one of the two."
            )

    def _require_writable_folders(self) -> None:
        folders: list[str | Path | None] = [logger.save_dir for logger in self.trainer.loggers]
        folders += [callback.dirpath for callback in self._model_checkpoints()]
        if self.subcommand == "fit":
            folders.append(str(Path(self.config_init["fit"]["autoencoder_training"].weights).parent))
        for folder in folders:
            if folder is not None:
                ensure_writable_folder(folder)
        saved = Path(self.trainer.log_dir or ".") / "config.yaml"
        if self.trainer.loggers and saved.exists():
            raise UserError(
                f"{saved} of an earlier run would be overwritten: expected a new folder of logs. Remove the file, or"
                " use loggers without a fixed version."
            )

    def _readable_checkpoint(self, wanted: str) -> str:
        path = self._newest_last_checkpoint() if wanted == "last" else wanted
        checkpoint = read_checkpoint(path)
        stored_components(checkpoint, path)
        needed: tuple[str, ...] = ("pytorch-lightning_version", "global_step", "epoch", "loops")
        if self.subcommand == "fit":
            needed = (*needed, "optimizer_states", "lr_schedulers")
        if missing := [key for key in needed if key not in checkpoint]:
            raise CheckpointError(
                f"{path} is no checkpoint to continue from: expected Lightning's {', '.join(needed)}, it lacks"
                f" {', '.join(missing)}. Name a whole checkpoint, or start from its weights with --model.init_from."
            )
        load_strictly(self.model, checkpoint["state_dict"], path)
        if wanted == "last":
            print(f"--ckpt_path last: {path}, the newest of its folder, after step {checkpoint['global_step']}")
        return path

    def _newest_last_checkpoint(self) -> str:
        folders = [Path(callback.dirpath) for callback in self._model_checkpoints() if callback.dirpath is not None]
        files = [file for folder in folders for file in folder.glob(f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}*.ckpt")]
        if not files:
            looked = ", ".join(map(str, folders)) or "no folder: no ModelCheckpoint has a dirpath"
            raise UserError(
                f"--ckpt_path last finds no checkpoint: expected a file last*.ckpt, looked in {looked}. Name a file, or"
                " leave --ckpt_path out to start anew."
            )
        return str(max(files, key=lambda file: file.stat().st_mtime))

    def _model_checkpoints(self) -> list[ModelCheckpoint]:
        return [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _readable(error: str) -> str:
    """The parser's message in words of the configuration, with what to do."""
    advice = "`slicemod fit --help` lists what is accepted; configs/digits.yaml is an example that works."
    if 'key "attention"' not in error:
        return f"{error.rstrip('.')}. {advice}"
    unknown = re.search(r"Option '([^']+)' is not accepted", error)
    given = re.search(r"Given value: (.+)", error)
    what = f"the unknown key {unknown[1]!r}" if unknown else (given[1].strip() if given else "something else")
    return (
        "attention: expected null or a block with keys out of budget (such as 64MiB), policy"
        f" ({', '.join(POLICIES)}), kernel ({', '.join(KERNELS)}), steps, checkpoint and upcast; got {what}. {advice}"
    )


def _how_to_continue(stop: TrainingInterruptedError, arguments: Sequence[str]) -> str:
    if stop.checkpoint is None:
        return (
            f"{stop} after step {stop.step}; no checkpoint was written: the autoencoder keeps none while it trains, and"
            " the UNet's come from slicemod.training.last_checkpoint.LastCheckpoint in trainer.callbacks."
            " Start the same command again."
        )
    again = shlex.join([*_without_checkpoint(arguments), "--ckpt_path", "last"])
    return f"{stop} after step {stop.step}. {stop.checkpoint} holds its state; continue with: slicemod {again}"


def _config_files(arguments: Sequence[str]) -> list[str]:
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    named = [after for option, after in pairs if option in ("-c", "--config")]
    return named + [option.removeprefix("--config=") for option in arguments if option.startswith("--config=")]


def _without_checkpoint(arguments: Sequence[str]) -> list[str]:
    kept = list(arguments)
    for place, argument in enumerate(kept):
        if argument == "--ckpt_path":
            return kept[:place] + kept[place + 2 :]
        if argument.startswith("--ckpt_path="):
            return kept[:place] + kept[place + 1 :]
    return kept


def _silence_known_warnings() -> None:
    for message in (
        r"\s*(``instantiate_classes``|skip_none parameter) was deprecated",  # old names that Lightning 2.6 uses
        r"\s*By default only one JsonargparseDeprecationWarning",  # and what jsonargparse adds to that
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # so does its use of torch's pytrees
        r"The \.grad attribute of a Tensor that is not a leaf",  # torch.compile looks at every input's
        r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen autoencoder, on purpose
    ):
        warnings.filterwarnings("ignore", message=message)


def _widen_tuples(component: type) -> None:
    """Corrects annotations such as ``tuple[int]``, one element, to the ``tuple[int, ...]`` that diffusers means.

    jsonargparse checks YAML against annotations, and diffusers writes those of ``AutoencoderKL`` the short way.
    """
    annotations = inspect.unwrap(component.__init__).__annotations__  # type: ignore[misc]
    for name, annotation in annotations.items():
        if get_origin(annotation) is tuple and len(get_args(annotation)) == 1:
            annotations[name] = tuple[get_args(annotation)[0], ...]  # type: ignore[misc]
