"""What importing slicemod and a first call leave unloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slicemod

ROOT = str(Path(__file__).parents[1])


COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running `code`."""
    listing = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", listing, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    return set(done.stdout.split())


def test_importing_slicemod_loads_no_compiler() -> None:
    loaded = loaded_by("import slicemod\nfrom slicemod import *")
    assert {"torch", "slicemod.attention"} <= loaded
    assert loaded.isdisjoint(COMPILER)


def test_importing_slicemod_alone_loads_nothing_until_a_name_is_asked_for() -> None:
    assert "torch" not in loaded_by("import slicemod; assert slicemod.__version__")
    assert "torch" in loaded_by("import slicemod; slicemod.SliceConfig")


def test_public_names_and_modules_are_attributes() -> None:
    names = "slicemod.adapters.compvis, slicemod.plan, slicemod.swap.HOSTS, slicemod.swap_attention"
    loaded_by(f"import slicemod; {names}; assert set(slicemod.__all__) <= set(dir(slicemod))")
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
    loaded_by(code)


CALL = """
import sys, torch
from slicemod import MemoryAwareCrossAttention, SliceConfig, sliced_attention, swap_attention
layer = MemoryAwareCrossAttention(23, context_dim=13, heads=3, dim_head=7, slicing=SliceConfig(kernel=sys.argv[1]))
layer.to(getattr(torch, sys.argv[2]))
x, context = (torch.randn(1, *sizes, dtype=layer.to_q.weight.dtype) for sizes in ((31, 23), (11, 13)))
with torch.no_grad():
    layer(x, context)
layer(x, context).sum().backward()
assert layer.to_q.weight.grad is not None
"""


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("auto", "bfloat16"), ("auto", "float16"), ("fused", "float32"), ("math", "float32")]
)
def test_an_eager_step_of_a_layer_loads_no_compiler(kernel: str, dtype: str) -> None:
    assert loaded_by(CALL, kernel, dtype).isdisjoint(COMPILER)
