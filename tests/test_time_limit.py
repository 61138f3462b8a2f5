"""Tests that `--until` leaves out are counted, so that a run cut short does not look whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_what_has_not_begun_in_time_is_left_out_and_counted() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--until", "0", "tests/test_pairwise.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"WARNING: \d+ tests left out", ran.stdout)
    assert "passed" not in ran.stdout
