"""An ``argparse`` parser whose errors are a ``UserError``: one paragraph instead of a usage listing."""

from __future__ import annotations

import argparse
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
