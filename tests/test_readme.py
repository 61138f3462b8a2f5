"""Python and YAML in README.md and docs/ run, page by page from top to bottom, and links lead somewhere."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ldm.util import instantiate_from_config
from torch import nn

from slicemod import MemoryAwareCrossAttention, SliceConfig
from tests.adapters import sgm_stand_in
from tests.documents import PAGES, ROOT, python_blocks

README = ROOT / "README.md"
HOSTS = ROOT / "docs" / "hosts.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_blocks(page: Path) -> int:
    """Runs blocks in one session; those with prompts are doctests, whose printed results have to come.

    Returns:
        How many ran.
    """
    names: dict[str, Any] = {}
    number = 0
    for number, block in enumerate(python_blocks(page), 1):
        title = f"{page.name}, block {number}"
        if ">>> " in block:
            test = doctest.DocTestParser().get_doctest(block, names, title, str(page), 0)
            wrong: list[str] = []
            doctest.DocTestRunner(verbose=False).run(test, out=wrong.append, clear_globs=False)
            assert wrong == [], "".join(wrong)
            names.update(test.globs)
        else:
            exec(compile(block, title, "exec"), names)  # our own text
    return number


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_blocks_run(page: Path) -> None:
    assert run_blocks(page) == page.read_text(encoding="utf-8").count("```python")  # none is indented and passed over


def test_python_blocks_of_the_readme_print_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(python_blocks(README)) >= 3
    run_blocks(README)
    printed = capsys.readouterr().out
    assert "bytes (exact)" in printed
    assert re.search(r"swapped \d+ attention layers \(.*\), skipped 0", printed)


def configs() -> dict[str, dict[str, object]]:
    """The blocks of YAML, by the name that each begins with."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", HOSTS.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {name: block for text in blocks for name, block in yaml.safe_load(text).items()}


@pytest.mark.usefixtures("omegaconf")
def test_the_unet_config_builds_a_swapped_unet() -> None:
    unet: nn.Module = instantiate_from_config(configs()["unet_config"])
    ours = [module for module in unet.modules() if isinstance(module, MemoryAwareCrossAttention)]
    assert {layer.slicing for layer in ours} == {SliceConfig(budget="2GiB")}


def test_the_network_config_names_the_mode_of_the_sgm_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = sgm_stand_in.import_adapter(monkeypatch)
    assert configs()["network_config"]["params"] == {"spatial_transformer_attn_type": adapter.MODE}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_and_files_that_a_page_names_exist(page: Path) -> None:
    targets = [
        target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in target
    ]
    assert [target for target in targets if not (page.parent / target).exists()] == []
    assert targets or page != README
