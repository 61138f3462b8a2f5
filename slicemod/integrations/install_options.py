"""What `slicemod install` and `slicemod uninstall` are told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from slicemod.arguments import ArgumentParser
from slicemod.integrations.programs import PROGRAMS

_DOES = {
    "install": "Puts a small folder into a program for images, which lets it compute attention by slicemod. The folder "
    "only imports slicemod, so that an upgrade of slicemod suffices. A folder of another's is never overwritten.",
    "uninstall": "Takes out again what `slicemod install` put into a program. Files that were changed since then are "
    "named, and stay.",
}


def parser(name: str = "install") -> ArgumentParser:
    """The parser of the arguments of either command."""
    options = ArgumentParser(f"slicemod {name}", description=_DOES[name])
    options.add_argument(
        "program", choices=PROGRAMS, metavar="PROGRAM", help="; ".join(f"{key}: {what}" for key, what in _named())
    )
    options.add_argument("path", metavar="PATH", help="the program's folder")
    options.add_argument(
        "--discard-changes", action="store_true", help="do so even if files of the folder were changed by hand"
    )
    return options


def _named() -> list[tuple[str, str]]:
    return [(key, program.title) for key, program in PROGRAMS.items()]
