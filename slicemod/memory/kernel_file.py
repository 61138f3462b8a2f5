"""Files under `/proc` and `/sys`, which the kernel writes anew for each reading."""

import os
from pathlib import Path

_READ_AT_ONCE = 2**16  # bytes


class KernelFile:
    """A file that the kernel writes whenever it is read.

    It stays open between readings: with a budget of "auto", calls read some of these files often.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor, self._process = -1, -1

    def read(self) -> bytes:
        """What it says now.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        process = os.getpid()
        if process != self._process:
            # A child opens its own: a daemon closes what it was born with, and the numbers are given out again.
            self._descriptor = os.open(self.path, os.O_RDONLY)
            self._process = process
        content = more = os.pread(self._descriptor, _READ_AT_ONCE, 0)  # short only at the end: it is one record
        while len(more) == _READ_AT_ONCE:
            more = os.pread(self._descriptor, _READ_AT_ONCE, len(content))
            content += more
        return content
