"""The figures of README and docs: blocks between two marks, filled from JSONs of `slicemod bench`.

A block is `<!-- slicemod bench FILES FORM ... -->` ... `<!-- end -->`. FILES is the place of a JSON seen from the page,
or a pattern of some. A FORM is one of `FORMS`, a kind of picture, `machine`, or `runs`, which takes a pattern.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from slicemod.bench.markdown_tables import (
    growth_sentence,
    growth_table,
    machine_sentence,
    peers_table,
    runs_table,
    span_sentence,
    works_table,
)
from slicemod.bench.pictures import KINDS, save_picture
from slicemod.bench.results import Results, load_results
from slicemod.user_error import UserError

FORMS: dict[str, Callable[[Results], str]] = {
    "span": span_sentence,
    "peers": peers_table,
    "works": works_table,
    "growing": growth_sentence,
    "growths": growth_table,
}
MACHINE, RUNS = "machine", "runs"
_BLOCK = re.compile(
    r"(?P<mark><!-- slicemod bench (?P<files>\S+) (?P<forms>[\w ]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def render(page: Path) -> list[Path]:
    """Fills the blocks of a Markdown page anew and draws its pictures; tells what it wrote.

    Raises:
        UserError: as `filled`; or a run has no figures for a picture.
    """
    if not page.is_file():
        raise UserError(f"{page}: expected a Markdown page with blocks; there is no such file. Name one.")
    text = filled(page)
    pictures = []
    for source, kind in named_pictures(page):
        pictures.append(picture_path(source, kind))
        save_picture(load_results(source), kind, pictures[-1])
    page.write_text(text, encoding="utf-8")
    return [page, *pictures]


def filled(page: Path) -> str:
    """The text of a Markdown page with its blocks filled anew.

    Raises:
        UserError: the page has no block, or one of an unknown form; or a file that a block names is missing.
    """

    def fill(found: re.Match[str]) -> str:
        sources = _sources(page, found["files"])
        content = "\n\n".join(_content(form, sources, page) for form in found["forms"].split())
        return f"{found['mark']}\n{content}\n\n{found['end']}"

    text, blocks = _BLOCK.subn(fill, page.read_text(encoding="utf-8"))
    if not blocks:
        raise UserError(
            f"{page}: expected a block `<!-- slicemod bench FILE.json FORM -->` to `<!-- end -->`; found none. Add one."
        )
    return text


def _content(form: str, sources: list[Path], page: Path) -> str:
    runs = [(source, load_results(source)) for source in sources]
    source, results = runs[0]
    if form in FORMS:
        return FORMS[form](results)
    if form == MACHINE:
        return machine_sentence(source, results, page.parent)
    if form == RUNS:
        return runs_table(runs, page.parent)
    if form in KINDS:
        return f"![{_ALT[form]}]({Path(os.path.relpath(picture_path(source, form), page.parent)).as_posix()})"
    raise UserError(
        f"{page}: expected blocks of {', '.join([*FORMS, *KINDS, MACHINE, RUNS])}; got {form!r}. Correct it."
    )


def named_results(page: Path) -> set[Path]:
    """The results that the blocks of a page name."""
    return {source for found in _blocks(page) for source in _sources(page, found["files"])}


def named_pictures(page: Path) -> list[tuple[Path, str]]:
    """The results and the kind of each picture of a page."""
    return [
        (_sources(page, found["files"])[0], form)
        for found in _blocks(page)
        for form in found["forms"].split()
        if form in KINDS
    ]


def picture_path(source: Path, kind: str) -> Path:
    """Where the picture of the results at `docs/benchmarks/NAME.json` is: `docs/images/benchmarks/NAME-KIND.png`."""
    folder = source.parent
    return folder.parent / "images" / folder.name / f"{source.stem}-{kind}.png"


def _blocks(page: Path) -> Iterator[re.Match[str]]:
    return _BLOCK.finditer(page.read_text(encoding="utf-8"))


def _sources(page: Path, files: str) -> list[Path]:
    found = sorted(page.parent.glob(files))
    if not found:
        raise UserError(f"{page}: expected results at {files}, seen from the page; found none. Correct the block.")
    return found


_ALT = {
    "trade": "Time against peak memory, a point for each way to compute attention",
    "ratios": "Time by SDPA's for each work, in inference and in training",
    "resolution": "Time and peak memory against the edge of the image",
    "growth": "Time per N² and peak memory against the number of tokens N",
}
