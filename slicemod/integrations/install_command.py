"""`slicemod install` and `slicemod uninstall`: slicemod's folder in another program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from slicemod import __version__
from slicemod.integrations.install_options import parser
from slicemod.integrations.installed_folder import InstalledFolder
from slicemod.integrations.program_python import install_command, python_of, source
from slicemod.integrations.programs import PROGRAMS, Program
from slicemod.user_error import UserError

_SOURCE_LINE = 'SOURCE = "slicemod"'


def run(arguments: Sequence[str]) -> int:
    """Installs or uninstalls, by the command's name in `arguments[0]`."""
    name = arguments[0]
    options = parser(name).parse_args(arguments[1:])
    program = PROGRAMS[options.program]
    root = program.root(Path(options.path).expanduser().absolute())
    folder = InstalledFolder(root / program.folder, f'slicemod {name} {options.program} "{options.path}"')
    if name == "uninstall":
        folder.remove(discard_changes=options.discard_changes)
        print(f"Removed {folder.path}. Restart {program.title}.")
        return 0
    if (reason := program.obstacle(root)) is not None:
        raise UserError(f"PATH: {root} {reason}")
    files = {program.code: _code(program)}
    updated = folder.write(files, __version__, discard_changes=options.discard_changes)
    print(f"{'Updated' if updated else 'Wrote'} {folder.path}.")
    print(_about_python(root, program))
    print(program.next_steps)
    return 0


def _code(program: Program) -> str:
    """The file for the program, with the place that slicemod can be installed from written into it."""
    text = (Path(__file__).parent / program.template).read_text(encoding="utf-8")
    return text.replace(_SOURCE_LINE, f"SOURCE = {source()!r}")


def _about_python(root: Path, program: Program) -> str:
    python = python_of(root)
    if python is None:
        return (
            f"The Python that {program.title} runs in needs slicemod, and none was found in {root}. If it is not this "
            f"one, {sys.executable}, install slicemod there: {install_command('PYTHON')}"
        )
    if python.has_slicemod:
        return f"{python.path}, which {program.title} runs in, has slicemod."
    found = "could not be started" if python.has_slicemod is None else "has no slicemod yet"
    return f"{python.path}, which {program.title} runs in, {found}. Install it there: {install_command(python.path)}"
