"""The files of a folder and its subfolders, those that links lead to besides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class FilesBelow(NamedTuple):
    """Files sorted by path, and the folders that could not be read with the reason."""

    files: list[Path]
    unreadable: list[tuple[Path, str]]


def files_below(root: Path) -> FilesBelow:
    """Looks through a folder and those below it, linked ones too.

    A folder that several paths lead to is read once, by a path without links if there is one: circles of links end.
    """
    files: list[Path] = []
    unreadable: list[tuple[Path, str]] = []
    seen: set[str] = set()
    linked = [root]
    while linked:
        folders = [linked.pop(0)]
        while folders:
            folder = folders.pop()
            if (place := os.path.realpath(folder)) in seen:
                continue
            seen.add(place)
            try:
                entries = sorted(folder.iterdir())
            except OSError as error:
                unreadable.append((folder, f"the folder cannot be read: {error.strerror or error}"))
                continue
            for entry in entries:
                if not entry.is_dir():
                    files.append(entry)
                elif entry.is_symlink():
                    linked.append(entry)
                else:
                    folders.append(entry)
    return FilesBelow(sorted(files), unreadable)
