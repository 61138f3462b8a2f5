"""The site under docs/ builds without warnings, and its figures and README's are those of the committed runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from slicemod.bench.markdown_blocks import fill_blocks, named_results
from slicemod.bench.results import load_results
from tests.documents import PAGES, ROOT

DOCS = ROOT / "docs"
FIGURES = [(page, name) for page in PAGES for name in sorted(named_results(page.read_text()))]


def test_readme_and_the_benchmark_page_take_their_figures_from_runs() -> None:
    assert {page.name for page, _ in FIGURES} == {"README.md", "benchmarks.md"}
    assert {name for _, name in FIGURES} == {path.name for path in (DOCS / "benchmarks").glob("*.json")}


@pytest.mark.parametrize(("page", "name"), FIGURES, ids=[f"{page.name}-{name}" for page, name in FIGURES])
def test_figures_are_those_of_the_run(page: Path, name: str) -> None:
    pictures = list((DOCS / "images" / "benchmarks" / Path(name).stem).glob("*.png"))
    assert pictures
    filled = fill_blocks(page, name, load_results(DOCS / "benchmarks" / name), pictures)
    assert filled == page.read_text(encoding="utf-8"), "`make figures` renews them"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="sphinx is not installed")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")
    api = (tmp_path / "api.html").read_text()
    assert all(name in api for name in ("MemoryAwareCrossAttention", "sliced_attention", "plan_slices", "peak_memory"))
