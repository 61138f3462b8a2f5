"""What several commands print in the same way: JSON, and tables that keep their columns where a terminal is narrow."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console


def wide_console(least: int = 110) -> Console:
    """A console of `least` columns or more, since a table that is squeezed into fewer cannot be read."""
    return Console(width=max(Console().width, least))


def print_json(what: dict[str, Any]) -> int:
    """Prints JSON, and returns the exit status of a command that has nothing more to say."""
    json.dump(what, sys.stdout, indent=2)
    print()
    return 0
