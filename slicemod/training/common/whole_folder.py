"""A folder of files that appears whole under its name or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slicemod.user_error import UserError
from slicemod.whole_file import ensure_writable_folder


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder in ``out`` whose files and folders move up into ``out`` when the block ends well.

    Otherwise they are removed. A process that is killed leaves them where they are, so that nothing looks whole.

    Raises:
        UserError: there are files in ``out``, or the files cannot be written.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out must be a folder that is missing or empty, got {out} with files in it: name another.")
    is_new = not out.exists()
    ensure_writable_folder(out)
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as name:
            yield Path(name)
            for part in sorted(
                Path(name).iterdir(), key=Path.is_file
            ):  # files last: model_index.json names the folders
                part.replace(out / part.name)
    except (OSError, SafetensorError) as error:  # what safetensors cannot write is an error of its own
        raise UserError(f"{out} cannot be written: {error}. Choose another place or make room.") from error
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
