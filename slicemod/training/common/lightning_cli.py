"""LightningCLI as `slicemod fit` and `slicemod validate` use it, whatever is trained."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError, Namespace, get_loader, set_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from slicemod import SliceConfig
from slicemod.kernels import KERNELS
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.training.common.checkpoints import CheckpointError, read_checkpoint, require_finite
from slicemod.training.common.config_errors import find_cause, named_numbers
from slicemod.training.common.interruption import StopBetweenSteps
from slicemod.training.common.kernel_table import KeepsKernelTable, checkpoints_table
from slicemod.training.common.last_checkpoint import LastCheckpoint, last_checkpoint
from slicemod.training.common.optimizers import try_optimizer
from slicemod.training.common.resumable_batches import SettlesSteps
from slicemod.training.common.run_folder import RunLock, require_own, run_folder
from slicemod.training.common.stop_signals import TrainingInterruptedError
from slicemod.training.common.whole_checkpoint_io import PREVIOUS, WholeCheckpointIO
from slicemod.training.common.yaml_files import config_files, read_configs, require_plain_yaml
from slicemod.user_error import UserError
from slicemod.whole_file import ensure_writable_folder


class SaveConfigBesideLogs(SaveConfigCallback):
    """Saves the resolved configuration beside the logs, and none where there are none to be beside."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Saves it."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class SlicemodCLI(LightningCLI):
    """LightningCLI with the top-level block ``attention``; a subclass for each kind of model.

    Args:
        model_class: what is trained.
        datamodule_class: what it is trained on.
        arguments: a subcommand, `fit` or `validate`, and its options.

    Raises:
        UserError: what was given cannot be parsed, built or read.
        TrainingInterruptedError: a signal stopped the training.
    """

    example: str  # a configuration that works, for messages

    def __init__(
        self,
        model_class: type[pl.LightningModule],
        datamodule_class: type[pl.LightningDataModule],
        arguments: Sequence[str],
    ) -> None:
        _silence_known_messages()
        self._lock = RunLock([])
        self._while_it_runs = ExitStack()
        given = read_configs(config_files(arguments))
        try:
            super().__init__(
                model_class,
                datamodule_class,
                trainer_defaults={"callbacks": [SettlesSteps(), StopBetweenSteps(), KeepsKernelTable()]},
                save_config_callback=SaveConfigBesideLogs,
                auto_configure_optimizers=False,  # they are arguments of the model, whose schedule steps every step
                load_from_checkpoint_support=False,  # the models store what rebuilds them themselves
                args=list(arguments),
            )
        except (ArgumentError, argparse.ArgumentError) as error:
            files = ", ".join(config_files(arguments)) or "no file"
            groups = {"model": model_class, "data": datamodule_class, "trainer": pl.Trainer}
            said = str(error)
            cause = self._readable(said, lambda: find_cause(said, given, arguments, groups))
            raise UserError(f"{cause} (configuration from {files} and the command line)") from error
        except MisconfigurationException as error:
            raise UserError(f"Lightning cannot run this configuration: {error}") from error

    @abstractmethod
    def check_checkpoint(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Raises a ``CheckpointError`` where the checkpoint at ``path`` is not one of this model."""

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
        """Adds the kind of model and the block ``attention``, which the model gets."""
        parser.add_argument("--task", type=str, help="What is trained: digits or stable_diffusion.")
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="The run's name: logs, checkpoints and samples go to runs/NAME, unless the trainer's blocks name other"
            " folders. Null is the name of the last configuration file.",
        )
        parser.add_argument(
            "--attention",
            type=SliceConfig | None,
            default=None,
            help="How the UNet's attention is sliced; null or leaving it out keeps the UNet's own attention.",
        )
        parser.link_arguments("attention", "model.attention")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses ``args`` alone: Lightning's own method warns where ``sys.argv`` holds anything besides."""
        arguments = cast("Sequence[str]", args)
        with _plain_yaml():
            self.config = parser.parse_args(arguments)
        options = self.config[self.config["subcommand"]]
        if options["run"] is None:  # said here, so that the configuration that is saved says it too
            options["run"] = Path([options["task"] or "digits", *config_files(arguments)][-1]).stem

    def _parse_ckpt_path(self) -> None:
        """Replaces Lightning's, which reads hyperparameters that these checkpoints do not have, errors unhandled."""

    def before_instantiate_classes(self) -> None:
        """Checks the numbers, and the attention block: jsonargparse buries its error under the types it tried besides.

        Raises:
            UserError: a number is not finite, or the block cannot be used.
        """
        for name, number in named_numbers(self.config[self.subcommand], ""):
            if not math.isfinite(number):
                raise UserError(f"{name}: expected a finite number, got {number}. Correct the configuration.")
        clip = self._get(self.config, "trainer").gradient_clip_val
        if clip is not None and clip < 0:
            raise UserError(f"trainer.gradient_clip_val: expected a number from 0 on, got {clip}. 1.0 is usual.")
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
                f" about; {self.example} is an example that works."
            ) from error
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            raise UserError(
                f"trainer.callbacks: expected each callback that has a state once. {error} Remove all but one."
            ) from error

    @property
    def run_folder(self) -> Path:
        """Where the run keeps what it writes."""
        return run_folder(self.config[self.subcommand]["run"])

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Builds the trainer, which writes to the run's folder, and checkpoints whole or not at all."""
        settings = self._get(self.config_init, "trainer")
        folder = str(self.run_folder)
        if settings.default_root_dir is None:
            kwargs["default_root_dir"] = folder
        if settings.logger in (None, True):
            kwargs["logger"] = [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")]
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, WholeCheckpointIO()]
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def _set_seed(self) -> None:
        """Seeds everything.

        Raises:
            UserError: the seed is out of range.
        """
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: expected a whole number from 0 to 4294967295; {error}.") from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with self._while_it_runs:
                super()._run_subcommand(subcommand)
        finally:
            self._lock.release()

    def before_fit(self) -> None:
        """Checks the optimizer, the checkpoint to continue from and the folders to write to."""
        try_optimizer(self.model.make_optimizer, self.model.make_lr_scheduler)
        options: Namespace = self.config_init["fit"]
        if options.get("ckpt_path") is not None:
            options["ckpt_path"] = self._readable_checkpoint(options["ckpt_path"])
        self.require_writable_folders()
        if self.trainer.is_global_zero:
            self._lock = RunLock(self._checkpoint_folders())
            require_own(self._checkpoint_folders(), options.get("ckpt_path"))

    def before_validate(self) -> None:
        """Checks the checkpoint, without which there is nothing to measure."""
        options: Namespace = self.config_init["validate"]
        if options.get("ckpt_path") is None:
            raise UserError("--ckpt_path is missing: expected the checkpoint to validate, written by `slicemod fit`.")
        options["ckpt_path"] = self._readable_checkpoint(options["ckpt_path"])
        self.require_writable_folders()

    def fit(self, **kwargs: Any) -> None:
        """``Trainer.fit`` that says what an interrupted run continues from."""
        if self.model.swap_report is not None and self.trainer.is_global_zero:
            print(self.model.swap_report)
        try:
            self.trainer.fit(**kwargs, weights_only=True)
        except TrainingInterruptedError as stop:
            stop.checkpoint = last_checkpoint(self.trainer)
            raise
        if self.trainer.is_global_zero:
            print("\n".join(self.written()))

    def validate(self, **kwargs: Any) -> None:
        """``Trainer.validate`` that unpickles no code."""
        self.trainer.validate(**kwargs, weights_only=True)

    def written(self) -> list[str]:
        """What the run wrote and where, a line each."""
        lines = [f"run {self.config[self.subcommand]['run']}: {self.trainer.global_step} steps done; it wrote"]
        if (path := last_checkpoint(self.trainer)) is not None:
            lines.append(f"  checkpoint  {_shown(path)}")
        logs = [getattr(logger, "log_dir", None) or logger.save_dir for logger in self.trainer.loggers]
        lines += [f"  logs        {_shown(log)}" for log in logs if log]
        lines += [
            f"  samples     {_shown(callback.folder)}"
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(getattr(callback, "folder", None), Path) and callback.folder.is_dir()
        ]
        return lines

    def folders(self) -> list[str | Path | None]:
        """Folders that the run writes to."""
        folders: list[str | Path | None] = [logger.save_dir for logger in self.trainer.loggers]
        return [*folders, *self._checkpoint_folders()]

    def require_writable_folders(self) -> None:
        """Checks them.

        Raises:
            UserError: a folder cannot be written, or an earlier run's configuration would be overwritten.
        """
        for folder in self.folders():
            if folder is not None:
                ensure_writable_folder(folder)
        saved = Path(self.trainer.log_dir or ".") / "config.yaml"
        if self.trainer.loggers and saved.exists() and self.trainer.is_global_zero:
            raise UserError(
                f"{saved} of an earlier run would be overwritten: expected a new folder of logs. Remove the file, or"
                " use loggers without a fixed version."
            )

    def _readable_checkpoint(self, wanted: str) -> str:
        if wanted != "last":
            self._check(read_checkpoint(wanted), wanted)
            return wanted
        files = self._last_checkpoints()
        for place, path in enumerate(files):
            try:
                checkpoint = read_checkpoint(path)
                require_finite(checkpoint["state_dict"], path)
            except CheckpointError as error:
                if place + 1 == len(files):
                    raise
                print(f"{error} Trying {files[place + 1]}, the one before.", file=sys.stderr)
                continue
            self._check(checkpoint, path)
            if self.trainer.is_global_zero:
                print(f"--ckpt_path last: {path}, the newest of its folder, after step {checkpoint['global_step']}")
            return path
        raise AssertionError("there is a last checkpoint or an error")  # _last_checkpoints raised already

    def _check(self, checkpoint: Mapping[str, Any], path: str) -> None:
        self.check_checkpoint(checkpoint, path)
        needed: tuple[str, ...] = ("pytorch-lightning_version", "global_step", "epoch", "loops")
        if self.subcommand == "fit":
            needed = (*needed, "optimizer_states", "lr_schedulers")
        if missing := [key for key in needed if key not in checkpoint]:
            raise CheckpointError(
                f"{path} is no checkpoint to continue from: expected Lightning's {', '.join(needed)}, it lacks"
                f" {', '.join(missing)}. Name a whole checkpoint, or start a new run from its weights."
            )
        if self.subcommand == "fit":
            self._require_finite_optimizers(checkpoint, path)
        context, said = checkpoints_table(checkpoint, path)
        self._while_it_runs.enter_context(context)
        if said is not None and self.trainer.is_global_zero:
            print(f"--ckpt_path {path}: {said}", file=sys.stderr)

    @staticmethod
    def _require_finite_optimizers(checkpoint: Mapping[str, Any], path: str) -> None:
        for optimizer in checkpoint["optimizer_states"]:
            require_finite(
                {
                    f"{name} of weight {n}": value
                    for n, own in optimizer["state"].items()
                    for name, value in own.items()
                },
                path,
            )

    def _last_checkpoints(self) -> list[str]:
        """Files that a run may continue from, the newest first."""
        folders = self._checkpoint_folders()
        names = (ModelCheckpoint.CHECKPOINT_NAME_LAST, PREVIOUS)
        files = [file for folder in folders for name in names for file in folder.glob(f"{name}*.ckpt")]
        if not files:
            looked = ", ".join(map(str, folders)) or "no folder: no ModelCheckpoint has a dirpath"
            raise UserError(
                f"--ckpt_path last finds no checkpoint: expected a file last*.ckpt, looked in {looked}. Name a file, or"
                " leave --ckpt_path out to start anew."
            )
        return [str(file) for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)]

    def _checkpoint_folders(self) -> list[Path]:
        folders = []
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                folders.append(callback.folder(self.trainer))
            elif isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                folders.append(Path(callback.dirpath))
        return list(dict.fromkeys(folders))

    def _readable(self, error: str, find: Callable[[], str]) -> str:
        """The parser's message in words of the configuration, with what to do."""
        advice = f"`slicemod fit --help` lists what is accepted; {self.example} is an example that works."
        if 'key "attention"' not in error:
            return f"{find().rstrip('.')}. {advice}"
        unknown = re.search(r"Option '([^']+)' is not accepted", error)
        given = re.search(r"Given value: (.+)", error)
        kernels = ", ".join(kernel.name for kernel in KERNELS)
        what = f"the unknown key {unknown[1]!r}" if unknown else (given[1].strip() if given else "something else")
        return (
            "attention: expected null or a block with keys out of budget (such as 64MiB), policy"
            f" ({', '.join(POLICIES)}), kernel (auto, {kernels}), steps, checkpoint and upcast; got {what}."
            f" {advice}"
        )


def _shown(path: Any) -> str:
    """A path as one would type it here."""
    full = Path(str(path)).resolve()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)


@contextmanager
def _plain_yaml() -> Iterator[None]:
    """Has every YAML text that the parser meets checked before it is read."""
    load = get_loader("yaml")

    def checked(text: str) -> Any:
        require_plain_yaml(text, "a YAML file or value")
        return load(text)

    set_loader("yaml", checked, (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", load, (yaml.YAMLError,))


def _silence_known_messages() -> None:
    """Of others, for the whole process: it is a command's. Their warnings stay but for those below."""
    for package in ("lightning.pytorch", "lightning.fabric"):  # what devices there are, tips, why training stopped
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in (
        r"\s*(``instantiate_classes``|skip_none parameter) was deprecated",  # old names that Lightning 2.6 uses
        r"\s*By default only one JsonargparseDeprecationWarning",  # and what jsonargparse adds to that
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # so does its use of torch's pytrees
        r"The \.grad attribute of a Tensor that is not a leaf",  # torch.compile looks at every input's
        r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen autoencoder, on purpose
        r"\s*Dynamo detected a call to a `functools.lru_cache`",  # diffusers', of PyTorch's version
        r"You're using the WeightAveraging callback with a model that overrides",  # WeightAverage refuses to shard
    ):
        warnings.filterwarnings("ignore", message=message)
