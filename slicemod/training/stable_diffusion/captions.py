"""Captions as they lie beside images: text files of several encodings, and ``metadata.jsonl``."""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

from slicemod.user_error import UserError

METADATA = "metadata.jsonl"  # as Hugging Face's imagefolder reads it: {"file_name": ..., "text": ...} a line

# The byte order marks that editors write. UTF-32's begins as UTF-16's does, so it comes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LINE_SHOWN = 60  # characters of a wrong line in an error


def read_text(path: Path) -> str:
    """A file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, without the mark; each end of line is ``\\n``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is in another encoding.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding).read()
    except UnicodeError as error:
        raise ValueError(f"expected UTF-8, or UTF-16 with its byte order mark, got other bytes ({error})") from error
    if "\0" in text:
        raise ValueError("expected UTF-8, or UTF-16 with its byte order mark, got text with null characters")
    return text


def place(path: Path) -> Path:
    """The one path of a file in a folder that several paths, by links, may lead to."""
    return Path(os.path.realpath(path.parent), path.name)  # Path.resolve raises where a link leads to itself


def captions_of_metadata(root: Path, files: Iterable[Path]) -> dict[Path, str]:
    """What every ``metadata.jsonl`` among ``files``, which lie below ``root``, says; by the ``place`` of the image.

    Raises:
        UserError: a file cannot be read, or a line is not as expected, leads out of ``root``, or contradicts another.
    """
    captions: dict[Path, str] = {}
    told: dict[Path, str] = {}  # where a caption stands
    for file in files:
        if file.name != METADATA:
            continue
        try:
            lines = read_text(file).split("\n")  # splitlines would also split at U+2028 within a caption
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}. Save it as UTF-8.") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            name, caption = _entry(line, where)
            path = place(file.parent / name)
            from_root = Path(os.path.normpath(file.parent.relative_to(root) / name))
            if Path(name).is_absolute() or from_root.parts[:1] == ("..",):
                raise UserError(
                    f"{where}: expected file_name to be a path from {file.parent} to a file below data.folder, got"
                    f" {name!r}. Correct the line."
                )
            if captions.setdefault(path, caption) != caption:
                raise UserError(
                    f"{where}: expected one caption for {name}, got another than in {told[path]}. Remove one of them."
                )
            told.setdefault(path, where)
    return captions


def _entry(line: str, where: str) -> tuple[str, str]:
    """File name and caption of a line of metadata."""
    try:
        entry = json.loads(line, object_pairs_hook=_each_once)
        name, caption = entry["file_name"], entry["text"]
        if not isinstance(name, str) or not isinstance(caption, str):
            raise TypeError("no text")
        if not name or "\0" in name + caption:
            raise ValueError("no name, or no text")
        (name + caption).encode()  # half a surrogate pair is no text either
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{where}: expected an object with file_name and text, both of them strings and told once, got"
            f" {line[:LINE_SHOWN]!r}. Correct the line."
        ) from error
    return name, caption


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, where Python would take the last of two values."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)
