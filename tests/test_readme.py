"""The Python in README.md runs, in one session from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from ldm.util import instantiate_from_config
from torch import nn

from slicemod import MemoryAwareCrossAttention, SliceConfig
from tests.adapters import sgm_stand_in

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # our own text
    printed = capsys.readouterr().out
    assert "bytes (exact)" in printed
    assert re.search(r"swapped \d+ attention layers, skipped 0", printed)


def configs() -> dict[str, dict[str, object]]:
    """The blocks of YAML, by the name that each begins with."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {name: block for text in blocks for name, block in yaml.safe_load(text).items()}


@pytest.mark.usefixtures("omegaconf")
def test_the_unet_config_of_the_readme_builds_a_swapped_unet() -> None:
    unet: nn.Module = instantiate_from_config(configs()["unet_config"])
    ours = [module for module in unet.modules() if isinstance(module, MemoryAwareCrossAttention)]
    assert {layer.slicing for layer in ours} == {SliceConfig(budget="2GiB", policy="exact")}


def test_the_network_config_of_the_readme_names_the_mode_of_the_sgm_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = sgm_stand_in.import_adapter(monkeypatch)
    assert configs()["network_config"]["params"] == {"spatial_transformer_attn_type": adapter.MODE}


def test_pictures_and_files_that_the_readme_names_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
