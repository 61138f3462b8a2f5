"""The figures of README and docs: blocks between two marks, filled from a JSON of `slicemod bench`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from slicemod.bench.pictures import KINDS
from slicemod.bench.results import Results
from slicemod.bench.tables import (
    machine_line,
    markdown_growth,
    markdown_headline,
    markdown_summary,
    markdown_tables,
)
from slicemod.user_error import UserError

FORMS: dict[str, Callable[[Results], str]] = {
    "machine": machine_line,
    "headline": markdown_headline,
    "summary": markdown_summary,
    "tables": markdown_tables,
    "paces": markdown_growth,
}
# <!-- slicemod bench NAME.json FORM --> ... <!-- end -->, where FORM is a key of FORMS or a kind of picture.
_BLOCK = re.compile(r"(<!-- slicemod bench (?P<name>\S+) (?P<form>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def named_results(text: str) -> set[str]:
    """File names of the results that the blocks of a Markdown text ask for."""
    return {found["name"] for found in _BLOCK.finditer(text)}


def fill_blocks(page: Path, name: str, results: Results, pictures: Sequence[Path]) -> str:
    """The text of a Markdown page with the blocks that ask for the results called `name` filled anew.

    Raises:
        UserError: the page has no such block, or one of an unknown form.
    """

    def fill(found: re.Match[str]) -> str:
        if found["name"] != name:
            return found[0]
        form = found["form"]
        if form in KINDS:
            lines = [
                f"![{path.stem.replace('-', ' ')}]({Path(os.path.relpath(path, page.parent)).as_posix()})"
                for path in sorted(pictures)
                if path.stem.startswith(f"{form}-")
            ]
            content = "\n\n".join(lines)
        elif form in FORMS:
            content = FORMS[form](results)
        else:
            raise UserError(
                f"{page}: expected a block of form {', '.join([*FORMS, *KINDS])}; got {form!r}. Correct it."
            )
        return f"{found[1]}\n{content}\n\n{found[4]}"

    text = page.read_text(encoding="utf-8")
    if name not in named_results(text):
        raise UserError(
            f"{page}: expected a block `<!-- slicemod bench {name} FORM -->` to `<!-- end -->`; found none. Add one."
        )
    return _BLOCK.sub(fill, text)
