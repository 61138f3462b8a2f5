"""The memory promises hold on a processor that has less than this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("layers/test_projection.py", "planning/test_cpu_temporaries.py", "planning/test_attention_costs.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ONEDNN_MAX_CPU_ISA", "SSE41"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),
        ("ATEN_CPU_CAPABILITY", "default"),
    ],
)
def test_memory_is_what_is_promised_with_fewer_instructions(variable: str, value: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in FILES)],
        cwd=ROOT,
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
