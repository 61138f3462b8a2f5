"""The site under docs/ builds without warnings, and its figures and README's are those of the committed runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from slicemod.bench.markdown_blocks import filled, named_pictures, named_results, picture_path
from slicemod.bench.pictures import SOURCE
from slicemod.bench.results import load_results
from tests.documents import PAGES, ROOT

DOCS = ROOT / "docs"
FIGURES = [page for page in PAGES if "<!-- slicemod bench" in page.read_text(encoding="utf-8")]


def test_every_run_is_shown_and_no_picture_is_left_over() -> None:
    assert [page.name for page in FIGURES] == ["README.md", "benchmarks.md"]
    named = {path for page in FIGURES for path in named_results(page)}
    assert named == set((DOCS / "benchmarks").glob("*.json"))
    pictures = {picture_path(*picture) for page in FIGURES for picture in named_pictures(page)}
    assert pictures == set((DOCS / "images" / "benchmarks").iterdir())


@pytest.mark.parametrize("page", FIGURES, ids=lambda page: page.name)
def test_figures_are_those_of_the_runs(page: Path) -> None:
    assert filled(page) == page.read_text(encoding="utf-8"), "`make figures` renews them"
    for source, kind in named_pictures(page):
        with Image.open(picture_path(source, kind)) as picture:
            assert picture.info[SOURCE] == load_results(source).digest, "`make figures` draws it anew"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="sphinx is not installed")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")
    api = (tmp_path / "api.html").read_text()
    assert all(name in api for name in ("MemoryAwareCrossAttention", "sliced_attention", "plan_slices", "peak_memory"))
