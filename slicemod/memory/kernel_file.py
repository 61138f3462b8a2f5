"""Files under `/proc` and `/sys`, whose content the kernel makes at each reading."""

import os
from pathlib import Path

_READ_AT_ONCE = 2**16  # bytes


class KernelFile:
    """A file whose content the kernel makes at each reading.

    It stays open between readings, because with the budget "auto" calls read some of these files often.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor, self._process = -1, -1

    def read(self) -> bytes:
        """The content of the file now.

        Raises:
            OSError: the file does not exist, or cannot be read.
        """
        process = os.getpid()
        if process != self._process:
            # A child process opens the file itself: daemons close the files that they inherit, and the system then
            # gives the same descriptor numbers to other files.
            self._descriptor = os.open(self.path, os.O_RDONLY)
            self._process = process
        content = more = os.pread(self._descriptor, _READ_AT_ONCE, 0)  # fewer bytes come only at the end of the file
        while len(more) == _READ_AT_ONCE:
            more = os.pread(self._descriptor, _READ_AT_ONCE, len(content))
            content += more
        return content
