"""The command `slicemod`: a table of subcommands, each imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from slicemod import __version__
from slicemod.hidden_packages import hidden
from slicemod.user_error import UserError


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        module: where its ``run(arguments) -> exit status`` lives.
        summary: its line in `slicemod --help`.
        options: where its ``parser()`` lives, which is without PyTorch.
        unneeded: packages that others import where they find them, for seconds, and that the command has no use for.
            Its options may name more, by their ``unneeded(arguments)``.
    """

    module: str
    summary: str
    options: str
    unneeded: tuple[str, ...] = ()


TRAINING = "slicemod.training.commands"
FIT, FIT_OPTIONS = f"{TRAINING}.fit_command", f"{TRAINING}.fit_options"
INSTALL, INSTALL_OPTIONS = "slicemod.integrations.install_command", "slicemod.integrations.install_options"
COMMANDS = {
    "fit": Command(FIT, "train or fine-tune what a YAML file describes", FIT_OPTIONS),
    "validate": Command(FIT, "measure a checkpoint on the validation split", FIT_OPTIONS),
    "sample": Command(f"{TRAINING}.sample_command", "draw images from a checkpoint", f"{TRAINING}.sample_options"),
    "export": Command(
        f"{TRAINING}.export_command",
        "write a checkpoint as a folder of diffusers', as one file of CompVis' layout, or its LoRA alone",
        f"{TRAINING}.export_options",
    ),
    "plan": Command(
        "slicemod.planning.plan_command",
        "tell what a picture or training takes, which part limits, and the largest image that fits",
        "slicemod.planning.plan_options",
        unneeded=("peft", "scipy", "transformers"),
    ),
    "kernels": Command(
        "slicemod.planning.kernels_command",
        "tell which kernels this machine has, and which one each layer of a model takes",
        "slicemod.planning.kernels_options",
        unneeded=("peft", "transformers"),
    ),
    "bench": Command(
        "slicemod.bench.bench_command",
        "time attention against its peers on this machine",
        "slicemod.bench.bench_options",
    ),
    "tune": Command(
        "slicemod.bench.tune_command",
        "measure on this machine from which size on each kernel pays off",
        "slicemod.bench.tune_options",
    ),
    "install": Command(INSTALL, "put slicemod into ComfyUI or a webui", INSTALL_OPTIONS),
    "uninstall": Command(INSTALL, "take it out of there again", INSTALL_OPTIONS),
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
        # Answers `--help` and wrong options at once, before the seconds that PyTorch takes to load.
        import_module(COMMANDS[name].options).parser(name).parse_args(given[1:])
        own_process = arguments is None
        with hidden(_unneeded(name, given) if own_process else ()):
            command = _module_of(name)
            if own_process and hasattr(command, "load"):
                command.load(given)
        status: int = command.run(given)
        return status
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "slicemod":
            raise
        print(f"slicemod {name}: {_missing(error.name)}", file=sys.stderr)
        return BAD_INPUT
    except (UserError, RuntimeError, ValueError) as error:
        if not isinstance(error, UserError) and not _is_for_the_user(error):
            raise
        print(f"slicemod {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"slicemod {name}: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _is_for_the_user(error: Exception) -> bool:
    from slicemod import NotEnoughMemoryError
    from slicemod.kernels.crossover_table import CrossoverTableError

    return isinstance(error, NotEnoughMemoryError | CrossoverTableError)


def _unneeded(name: str, arguments: Sequence[str]) -> tuple[str, ...]:
    options = import_module(COMMANDS[name].options)
    return (*COMMANDS[name].unneeded, *(options.unneeded(arguments) if hasattr(options, "unneeded") else ()))


def _module_of(name: str) -> Any:
    if COMMANDS[name].module not in sys.modules and sys.stderr.isatty():
        print(f"slicemod {name}: loading PyTorch and what it needs beside it ...", file=sys.stderr, flush=True)
    return import_module(COMMANDS[name].module)


def _missing(package: str) -> str:
    return (
        f"needs the package {package}, which is not installed. Install slicemod with its extra `train`, from a clone "
        "by `pip install -e '.[train]'`."
    )


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
