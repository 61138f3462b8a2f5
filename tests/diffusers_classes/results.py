"""The results of all configurations as docs/diffusers-classes.json, from which the page is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from tests.diffusers_classes.trial import Trial
from tests.documents import ROOT

PAGE = ROOT / "docs" / "diffusers-classes.md"
RESULTS = PAGE.with_suffix(".json")


@dataclass(frozen=True)
class Results:
    """What `make hosts-table` found.

    Attributes:
        versions: those of diffusers and torch, and the commit of the checkout with the tests.
        trials: one for each configuration.
        not_run: the reason for each class without a configuration.
    """

    versions: dict[str, str]
    trials: Sequence[Trial]
    not_run: dict[str, str]

    def write(self) -> None:
        """Write them, a line for each trial."""
        written = {"versions": self.versions, "trials": "TRIALS", "not_run": self.not_run}
        lines = ",\n".join(f"  {json.dumps(_set(trial))}" for trial in self.trials)
        text = json.dumps(written, indent=1).replace('"TRIALS"', f"[\n{lines}\n ]")
        RESULTS.write_text(text + "\n", encoding="utf-8")


def read_results() -> Results:
    """What was written last."""
    read = json.loads(RESULTS.read_text(encoding="utf-8"))
    return Results(read["versions"], [Trial(**trial) for trial in read["trials"]], read["not_run"])


def _set(trial: Trial) -> dict[str, object]:
    """The fields that are not as they are by default."""
    values = {field.name: (getattr(trial, field.name), field.default) for field in fields(trial)}
    return {name: value for name, (value, default) in values.items() if value != default}
