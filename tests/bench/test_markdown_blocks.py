"""Blocks of a page are filled from the results that they name, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from slicemod.bench.markdown_blocks import FORMS, filled, named_pictures, named_results, render
from slicemod.user_error import UserError
from tests.bench.tiny import made_up_results


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """An empty page with three runs beside it."""
    (tmp_path / "runs").mkdir()
    for name in ("one", "two-old", "three-old"):
        made_up_results().save(tmp_path / "runs" / f"{name}.json")
    return tmp_path / "page.md"


def test_blocks_are_filled_and_nothing_else_changes(page: Path) -> None:
    page.write_text(
        "before\n\n<!-- slicemod bench runs/one.json peers -->\nold\n<!-- end -->\n\nbetween\n\n"
        "<!-- slicemod bench runs/one.json span growth -->\n<!-- end -->\n"
        "<!-- slicemod bench runs/*-*.json runs -->\n<!-- end -->\nafter",
        encoding="utf-8",
    )
    written = render(page)
    picture = page.parent / "images" / "runs" / "one-growth.png"
    assert written == [page, picture]
    assert picture.exists()
    text = page.read_text(encoding="utf-8")
    table, span = (FORMS[form](made_up_results()) for form in ("peers", "span"))
    assert text.startswith(
        f"before\n\n<!-- slicemod bench runs/one.json peers -->\n\n{table}\n\n<!-- end -->\n\nbetween\n\n"
        f"<!-- slicemod bench runs/one.json span growth -->\n\n{span}\n\n"
        "![Time per N² and peak memory against the number of tokens N](images/runs/one-growth.png)\n\n<!-- end -->\n"
    )
    assert [line.split(" | ")[0] for line in text.splitlines() if "-old.json)" in line] == [
        "| [three-old.json](runs/three-old.json)", "| [two-old.json](runs/two-old.json)"
    ]  # fmt: skip
    assert text.endswith("<!-- end -->\nafter")
    assert filled(page) == text
    assert {path.name for path in named_results(page)} == {"one.json", "two-old.json", "three-old.json"}
    assert named_pictures(page) == [(page.parent / "runs" / "one.json", "growth")]


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ("nothing", r"page\.md: expected a block"),
        ("<!-- slicemod bench runs/one.json chart -->\n<!-- end -->", "'chart'"),
        ("<!-- slicemod bench runs/four.json peers -->\n<!-- end -->", r"expected results at runs/four\.json"),
    ],
)
def test_what_a_page_lacks_is_named(block: str, named: str, page: Path) -> None:
    page.write_text(block, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        render(page)
    assert page.read_text(encoding="utf-8") == block


def test_a_page_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.md: expected a Markdown page"):
        render(tmp_path / "gone.md")
