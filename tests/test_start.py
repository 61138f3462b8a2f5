"""What importing slicemod and a first call leave unloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from slicemod.watched import constant_in_graph

ROOT = str(Path(__file__).parents[1])


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running `code`."""
    listing = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", listing],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    return set(done.stdout.split())


def test_importing_slicemod_loads_no_compiler() -> None:
    loaded = loaded_by("import slicemod\nfrom slicemod import *")
    assert {"torch", "slicemod.attention"} <= loaded
    assert loaded.isdisjoint({"torch._dynamo", "torch._inductor", "sympy"})


def test_what_pytorch_marks_constant_is_marked_the_same_way() -> None:
    def by_us() -> None: ...
    def by_pytorch() -> None: ...

    assert constant_in_graph(by_us) is by_us
    torch.compiler.assume_constant_result(by_pytorch)  # type: ignore[no-untyped-call]
    assert vars(by_us) == vars(by_pytorch) != {}
