"""The command `slicemod`: a table of subcommands, each imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from slicemod import NotEnoughMemoryError, __version__
from slicemod.user_error import UserError


class Command(NamedTuple):
    """Where a subcommand's ``run(arguments) -> exit status`` lives, and its line in `slicemod --help`."""

    module: str
    summary: str


COMMANDS = {
    "fit": Command("slicemod.training.fit_command", "train or fine-tune what a YAML file describes"),
    "validate": Command("slicemod.training.fit_command", "measure a checkpoint on the validation split"),
    "sample": Command("slicemod.training.sample_command", "draw images from a checkpoint"),
    "export": Command("slicemod.training.export_command", "write a checkpoint in diffusers' folder layout"),
    "plan": Command(
        "slicemod.planning.plan_command", "tell whether a UNet's step fits a device, and in how many slices"
    ),
    "bench": Command("slicemod.bench.bench_command", "time attention against its peers on this machine"),
}
BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; 130 is the shell's for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: the subcommand's name and its arguments; None takes ``sys.argv[1:]``.

    Returns:
        The exit status: 0, 2 for bad input (one paragraph on stderr says what) or 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if given else sys.stderr)
        return 0 if given else BAD_INPUT
    if given[0] == "--version":
        print(f"slicemod {__version__}")
        return 0
    name = given[0]
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command {name!r}: expected one of {', '.join(COMMANDS)}.")
        status: int = _module_of(name).run(given)
        return status
    except (UserError, NotEnoughMemoryError) as error:
        print(f"slicemod {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"slicemod {name}: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _module_of(name: str) -> Any:
    try:
        return import_module(COMMANDS[name].module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "slicemod":
            raise
        raise UserError(
            f"needs the package {error.name}, which is not installed. Install slicemod with its extra `train`, from a "
            "clone by `pip install -e '.[train]'`."
        ) from error


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: slicemod COMMAND ...    or: slicemod --version",
            "",
            "Attention in slices that fit a memory budget, for latent-diffusion UNets.",
            "",
            *lines,
            "",
            "`slicemod COMMAND --help` says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
