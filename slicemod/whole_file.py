"""Writing files whole or not at all: beside the old file first, and then in its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slicemod.user_error import UserError


@contextmanager
def replacing(path: str | os.PathLike[str], keep_as: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Gives the name of a temporary file beside ``path`` that takes ``path``'s place when the block ends well.

    The folder is made where it is missing. A command whose option names ``path`` asks for it before
    (``slicemod.arguments.require_folder_of``).

    Args:
        path: of the file to write.
        keep_as: the name beside ``path`` that a file which is there gets, once the new one is whole on the disk.

    Raises:
        UserError: the folder cannot be made or written.
    """
    target = Path(path)
    ensure_writable_folder(target.parent)
    if target.is_dir():
        raise UserError(f"{target} cannot be written: expected the name of a file, got a folder. Name a file in it.")
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as written:  # Windows flushes no handle that cannot write
            os.fsync(written.fileno())  # else a power cut could leave the new name with half its content
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        if keep_as is not None and target.exists():
            target.replace(keep_as)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}. Choose another place or make room.") from error
    finally:
        temporary.unlink(missing_ok=True)


def ensure_writable_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the folder where it is missing and checks that files can be made in it.

    Raises:
        UserError: the folder cannot be made, or no file can be made in it.
    """
    in_the_way = next((path for path in (Path(folder), *Path(folder).parents) if path.exists()), None)
    if in_the_way is not None and not in_the_way.is_dir():
        raise UserError(
            f"The folder {folder} cannot be written: {in_the_way} is a file. Choose a folder that you may write to."
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be written: {error.strerror or error}. Choose a folder that you may write to,"
            " or change its permissions."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
