"""Files of the kernel: read anew, to their ends, by the process itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slicemod.memory.kernel_file import KernelFile

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")


def test_each_reading_is_of_what_the_file_says_now(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    file = KernelFile(path)
    assert file.read() == b"one"
    path.write_bytes(b"another")
    assert file.read() == b"another"


@pytest.mark.parametrize("length", [2**16 - 1, 2**16, 2**16 + 1, 200_003])
def test_a_file_of_any_length_is_read_to_its_end(length: int, tmp_path: Path) -> None:
    content = (b"0123456789" * (length // 10 + 1))[:length]
    (tmp_path / "file").write_bytes(content)
    assert KernelFile(tmp_path / "file").read() == content


def test_a_child_that_closes_all_files_reads_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "right").write_bytes(b"right")
    (tmp_path / "other").write_bytes(b"other")
    program = """
import os, sys
from pathlib import Path
from slicemod.memory.kernel_file import KernelFile
right, other = map(Path, sys.argv[1:])
file = KernelFile(right)
file.read()
if os.fork() == 0:
    os.closerange(3, 100)
    for _ in range(50):
        os.open(other, os.O_RDONLY)
    os._exit(file.read() != b"right")
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    subprocess.run([sys.executable, "-c", program, tmp_path / "right", tmp_path / "other"], check=True)
