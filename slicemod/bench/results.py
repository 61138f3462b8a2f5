"""The results of a run in memory and as JSON, written whole after every comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from slicemod.bench.comparing import LeftOut, Measurement, Setting
from slicemod.user_error import UserError
from slicemod.whole_file import replacing

FORMAT = 1


@dataclass
class Results:
    """What a run has found so far.

    Attributes:
        command: the arguments that it was called with.
        machine: as `describe_machine` gives it.
        measurements: of every comparison that was begun, one comparison after the other, SDPA first in each.
        left_out: the peers that were not measured.
    """

    command: list[str]
    machine: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def comparisons(self) -> Iterator[tuple[str, Setting, list[Measurement]]]:
        """The measurements by work and setting."""
        for (work, setting), rows in groupby(self.measurements, lambda row: (row.work, row.setting)):
            yield work, setting, list(rows)

    def settings(self) -> list[Setting]:
        """Every setting once."""
        return list(dict.fromkeys(row.setting for row in self.measurements))

    @property
    def digest(self) -> str:
        """A number that other results do not have."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes JSON that appears whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        with replacing(path) as beside:
            beside.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def load_results(path: Path) -> Results:
    """What `Results.save` wrote.

    Raises:
        UserError: the file is missing or is no such JSON.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        measurements = [
            _with_setting(Measurement, row | {"spread": tuple(row["spread"])}) for row in read["measurements"]
        ]
        left_out = [_with_setting(LeftOut, row) for row in read["left_out"]]
        return Results(read["command"], read["machine"], measurements, left_out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected a JSON of `slicemod bench --json`; {type(error).__name__}: {error}. Name such a file."
        ) from error


def _with_setting(kind: Any, row: dict[str, Any]) -> Any:
    return kind(**row | {"setting": Setting(**row["setting"])})
