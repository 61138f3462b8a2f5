"""docs/diffusers-classes.md, from the results of all configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.diffusers_classes.results import Results
from tests.diffusers_classes.trial import Trial

_ABOUT = """# diffusers' model classes

What slicemod does for each model class of diffusers {diffusers}, with PyTorch {torch}. Every class was built small,
with random weights, and called in float32 on a CPU. The configurations are those of diffusers' own tests of models
(commit {commit}), and some of slicemod's for classes that these leave out. To renew this page, give the path of a
checkout of diffusers:

    make hosts-table DIFFUSERS=../diffusers

A difference is the largest of any element from the class's own output, divided by the largest element of that output.
To compare, the last column has the difference when PyTorch's own attention takes its other way, matrix products instead
of a fused kernel. Attention was computed in three slices.
"""


@dataclass(frozen=True)
class _Class:
    """All configurations of one model class that could be run."""

    name: str
    trials: tuple[Trial, ...]

    def total(self, field: str) -> int:
        return sum(getattr(trial, field) for trial in self.trials)

    def largest(self, field: str) -> float | None:
        return max((value for trial in self.trials if (value := getattr(trial, field)) is not None), default=None)

    @property
    def all_sliced(self) -> bool:
        return self.total("sliced") == self.total("attends") and not any(trial.passed_on for trial in self.trials)

    @property
    def swap(self) -> str:
        """How much of the attention `swap_attention` takes."""
        if not self.total("swapped"):
            return "no"
        return "in part" if self.total("left") or any(trial.refusal for trial in self.trials) else "all"

    @property
    def backend(self) -> str:
        """How much of the attention diffusers' dispatcher takes."""
        calls = self.total("by_backend")
        return "all" if calls == self.total("attends") else "in part" if calls else "no"


def page(results: Results) -> str:
    """The text of the page."""
    classes = _classes(results.trials)
    attending = [each for each in classes if each.total("attends")]
    unseen = [each for each in classes if each.total("flex") or each.total("softmax")]
    without = [each.name for each in classes if each not in attending and each not in unseen]
    failed = {trial.model: trial.failure for trial in results.trials if trial.failure is not None}
    ran = {each.name for each in classes}
    failed = {name: reason for name, reason in failed.items() if name not in ran} | results.not_run
    parts = [
        _ABOUT.format(**results.versions),
        _summary(attending, len(unseen), len(without), len(failed)),
        "## Classes that call `F.scaled_dot_product_attention`\n\n" + _table(attending),
        "## Classes with attention that `sliced_sdpa` does not see\n\n"
        "Not every softmax is attention's: HiDream's chooses between experts.\n\n"
        + _rows(
            ("Class", "FlexAttention", "Softmax of its own", "`swap_attention`"),
            (
                (each.name, each.total("flex"), each.total("softmax"), _part(each.swap, each, "swap_difference"))
                for each in unseen
            ),
        ),
        "## Classes without softmax attention\n\n" + ", ".join(without) + ".",
        "## Classes that were not run\n\n" + _rows(("Class", "Reason"), sorted(failed.items())),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _classes(trials: Iterable[Trial]) -> list[_Class]:
    by_name: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.failure is None:
            by_name.setdefault(trial.model, []).append(trial)
    return [_Class(name, tuple(found)) for name, found in sorted(by_name.items())]


def _summary(attending: Sequence[_Class], unseen: int, without: int, failed: int) -> str:
    configurations = sum(len(each.trials) for each in attending)

    def row(text: str, field: str, chosen: Callable[[_Class], bool]) -> tuple[str, str, str]:
        found = [each for each in attending if chosen(each)]
        differences = [value for each in found if (value := each.largest(field)) is not None]
        return text, str(len(found)), _number(max(differences, default=None))

    return _rows(
        ("", "Classes", "Largest difference"),
        [
            ("call `F.scaled_dot_product_attention`", str(len(attending)), ""),
            row("&nbsp; every call sliced by `sliced_sdpa`", "sdpa_difference", lambda each: each.all_sliced),
            row("&nbsp; not every call", "sdpa_difference", lambda each: not each.all_sliced),
            row("&nbsp; swapped by `swap_attention`, all", "swap_difference", lambda each: each.swap == "all"),
            row("&nbsp; swapped in part, which it warns of", "swap_difference", lambda each: each.swap == "in part"),
            row("&nbsp; refused by `swap_attention`", "swap_difference", lambda each: each.swap == "no"),
            row('&nbsp; all by the backend "slicemod"', "backend_difference", lambda each: each.backend == "all"),
            row("&nbsp; in part by the backend", "backend_difference", lambda each: each.backend == "in part"),
            row("&nbsp; not by the backend", "backend_difference", lambda each: each.backend == "no"),
            ("call FlexAttention or a softmax of their own", str(unseen), ""),
            ("no softmax attention", str(without), ""),
            ("not run", str(failed), ""),
        ],
    ) + (
        f"\n\nThe first row is {configurations} configurations. After `restore_attention` every swapped class gave "
        "the same bits as before."
        if all(trial.restored in (None, True) for each in attending for trial in each.trials)
        else f"\n\nThe first row is {configurations} configurations."
    )


def _table(classes: Iterable[_Class]) -> str:
    return _rows(
        ("Class", "Calls", "`sliced_sdpa`", "`swap_attention`", "backend", "PyTorch's own"),
        (
            (
                each.name,
                str(each.total("attends")),
                _part("all" if each.all_sliced else f"{each.total('sliced')} calls", each, "sdpa_difference"),
                _part(each.swap, each, "swap_difference"),
                _part(each.backend, each, "backend_difference"),
                _number(each.largest("yardstick")),
            )
            for each in classes
        ),
    )


def _part(word: str, each: _Class, field: str) -> str:
    largest = each.largest(field)
    return word if word == "no" or largest is None else f"{word}, {_number(largest)}"


def _number(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.0e}" if difference else "0"


def _rows(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
