"""How the scripts of `train_scripts/` end: with a status, and a paragraph where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from slicemod import NotEnoughMemoryError
from slicemod.training.common.stop_signals import TrainingInterruptedError
from slicemod.user_error import UserError


def exit_status(name: str, run: Callable[[], object], kept: str) -> int:
    """Runs a script and returns its exit status: 0, 2 for bad input, or 130 after Ctrl-C.

    Args:
        name: of the script.
        run: what it does.
        kept: what is said after Ctrl-C, of what need not be done again.
    """
    try:
        run()
    except (UserError, NotEnoughMemoryError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (TrainingInterruptedError, KeyboardInterrupt):
        print(f"{name}: interrupted. Run it again; {kept}.", file=sys.stderr)
        return 130
    return 0
