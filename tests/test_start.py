"""What importing slicemod and a first call leave unloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slicemod

ROOT = str(Path(__file__).parents[1])
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}

CALL = """
import torch
from slicemod import MemoryAwareCrossAttention, SliceConfig
layer = MemoryAwareCrossAttention(23, context_dim=13, heads=3, dim_head=7, slicing=SliceConfig(kernel="{kernel}"))
layer.to(torch.{dtype})
x, context = (torch.randn(1, *sizes, dtype=layer.to_q.weight.dtype) for sizes in ((31, 23), (11, 13)))
with torch.no_grad():
    layer(x, context)
layer(x, context).sum().backward()
assert layer.to_q.weight.grad is not None
"""
LAYERS = [("auto", "bfloat16"), ("auto", "float16"), ("fused", "float32"), ("math", "float32")]


def loaded_after(*steps: str) -> list[set[str]]:
    """The modules that a fresh interpreter has loaded after each step of code."""
    listing = "\nimport sys; print(*sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", listing.join([*steps, ""])],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def loaded() -> dict[Any, set[str]]:
    """What is loaded after ever more of slicemod was used: one interpreter, since each loads PyTorch for seconds."""
    steps: dict[Any, str] = {
        "package": "import slicemod; assert slicemod.__version__",
        "name": "slicemod.SliceConfig",
        "all names": "from slicemod import *",
        **{(kernel, dtype): CALL.format(kernel=kernel, dtype=dtype) for kernel, dtype in LAYERS},
    }
    return dict(zip(steps, loaded_after(*steps.values()), strict=True))


def test_importing_slicemod_alone_loads_nothing_until_a_name_is_asked_for(loaded: dict[Any, set[str]]) -> None:
    assert "torch" not in loaded["package"]
    assert "torch" in loaded["name"]


def test_importing_slicemod_loads_no_compiler(loaded: dict[Any, set[str]]) -> None:
    assert {"torch", "slicemod.attention"} <= loaded["all names"]
    assert loaded["all names"].isdisjoint(COMPILER)


@pytest.mark.parametrize(("kernel", "dtype"), LAYERS)
def test_an_eager_step_of_a_layer_loads_no_compiler(kernel: str, dtype: str, loaded: dict[Any, set[str]]) -> None:
    assert loaded[kernel, dtype].isdisjoint(COMPILER)


def test_public_names_and_modules_are_attributes() -> None:
    names = "slicemod.adapters.compvis, slicemod.plan, slicemod.swap.HOSTS, slicemod.swap_attention"
    loaded_after(f"import slicemod; {names}; assert set(slicemod.__all__) <= set(dir(slicemod))")
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = slicemod.colour
    assert all(getattr(slicemod, name).__name__ == name for name in slicemod.__all__)


def test_hosts_are_known_to_the_module_that_swaps() -> None:
    code = """
from torch import nn
from slicemod.swap import HOSTS, swap_attention
try:
    swap_attention(nn.Linear(2, 3))
except ValueError as error:
    assert "CompVis LDM, diffusers, lookalikes" in str(error), error
else:
    raise SystemExit("swapped")
"""
    loaded_after(code)


PROGRAM_OF_A_COMMAND = """
import atexit, json, sys
from slicemod.cli import main
sys.argv[1:] = json.loads(sys.argv[1])
heavy = {"matplotlib", "peft", "scipy", "sklearn", "transformers"}
atexit.register(lambda: print("loaded:", sorted(heavy & set(sys.modules)), file=sys.stderr))
main()
"""


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--task", "digits", "--help"],
        pytest.param(["plan", "sd15", "--resolution", "512"], marks=pytest.mark.slow),
    ],
)
def test_a_command_loads_no_package_that_others_import_for_features_it_does_not_use(command: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM_OF_A_COMMAND, json.dumps(command)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert ran.stdout
    assert ran.stderr.splitlines()[-1] == "loaded: []"
