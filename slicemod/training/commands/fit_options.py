"""What `slicemod fit` and `validate` are told before a task is named: which tasks there are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from slicemod.arguments import ArgumentParser
from slicemod.training.common.yaml_files import config_files, options, read_configs
from slicemod.user_error import UserError

EXAMPLES = {
    "stable_diffusion": "--config configs/sd15_lora.yaml --data.folder photos",
    "digits": "--config configs/digits.yaml",
}


def nothing_named(command: str) -> str:
    """What to say where neither a file nor a task is named."""
    ways = " or ".join(f"`slicemod {command} {example}` ({task})" for task, example in EXAMPLES.items())
    return (
        f"expected a configuration, which says what is trained, such as {ways}. `slicemod {command} --help` says more."
    )


def unneeded(arguments: Sequence[str]) -> tuple[str, ...]:
    """Optional packages that Lightning and diffusers import for seconds, and that nothing here has a use for."""
    parts = {argument.partition("=")[0] for argument in arguments}
    if not parts.isdisjoint({"-h", "--help", "--print_config"}):
        return "matplotlib", "peft", "scipy", "sklearn", "transformers"
    if not parts.isdisjoint({"--dry_run", "--dry-run"}):
        model = read_configs(config_files(arguments)).get("model") or {}
        trained = [model.get("trained", "lora"), *options(arguments, "--model.trained")][-1]
        return "matplotlib", "scipy", "sklearn", *(() if trained == "lora" else ("peft", "transformers"))
    return ("sklearn",)


class _UntilATaskIsNamed(ArgumentParser):
    """Leaves all options to the task's own parser, but for those that no task can answer."""

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Prints the help where no task is named.

        Raises:
            UserError: there are no arguments.
        """
        if not args:
            raise UserError(nothing_named(self.prog.rpartition(" ")[2]))
        named = {option.partition("=")[0] for option in args} & {"-c", "--config", "--task"}
        if not named and not {"-h", "--help"}.isdisjoint(args):
            self.print_help()
            self.exit()
        return argparse.Namespace()


def parser(name: str = "fit") -> ArgumentParser:
    """The parser of arguments without a task."""
    goal = "Trains or fine-tunes what a YAML file describes." if name == "fit" else "Measures a checkpoint."
    options = _UntilATaskIsNamed(
        f"slicemod {name}",
        usage=f"slicemod {name} --config FILE.yaml [options]",
        description=f"{goal} What can be trained: digits (as in configs/digits.yaml), and stable_diffusion (as in "
        "configs/sd15_lora.yaml, sd15_full.yaml, sd21_v.yaml, sdxl_lora.yaml).",
        epilog=f"A task's own options, hundreds, are those of its model, its data and Lightning's Trainer: `slicemod "
        f"{name} --task digits --help` or `slicemod {name} --task stable_diffusion --help`, which takes some seconds.",
    )
    options.add_argument("-c", "--config", metavar="FILE.yaml", help="what to run; several are merged, the last wins")
    options.add_argument("--task", metavar="TASK", help="digits or stable_diffusion (default: that of the YAML file)")
    options.add_argument("--ckpt_path", metavar="FILE.ckpt", help="continue from this checkpoint; last is the newest")
    if name == "fit":
        options.add_argument("--dry_run", action="store_true", help="of stable_diffusion: tell the peak of each bucket")
    options.add_argument("--print_config", action="store_true", help="show the whole configuration and stop")
    options.add_argument("--NAME", metavar="VALUE", help="any key of the YAML file, such as --trainer.max_steps 100")
    return options
