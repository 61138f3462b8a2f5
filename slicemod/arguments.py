"""An ``argparse`` parser whose errors are a ``UserError``: one paragraph instead of a usage listing; and its checks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from slicemod.user_error import UserError


class ArgumentParser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` for one subcommand of `slicemod`."""

    def error(self, message: str) -> NoReturn:
        """Raises what the command line prints as one paragraph.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}. `{self.prog} --help` lists what is expected.")


def require_folder_of(path: Path, option: str) -> None:
    """Checks before the work that the file which an option names can be written into its folder.

    Raises:
        UserError: there is no such folder. None is made: the name may be mistyped.
    """
    if not path.parent.is_dir():
        raise UserError(f"{option}: expected a file in a folder that exists; got {path}. Make the folder first.")
