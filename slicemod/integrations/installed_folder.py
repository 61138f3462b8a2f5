"""The folder that slicemod puts into another program: written whole, known by its digests, taken out again."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from slicemod.user_error import UserError

MARKER = "installed-by-slicemod.json"
_CACHE = "__pycache__"


@dataclass(frozen=True)
class InstalledFolder:
    """A folder of slicemod's in another program, or the place for one.

    Attributes:
        path: the folder.
        command: what installed it or takes it out, for messages.
    """

    path: Path
    command: str

    def write(self, files: dict[str, str], version: str, *, discard_changes: bool = False) -> bool:
        """Put files there, by their names. The folder appears whole or not at all.

        Returns:
            Whether slicemod's folder was there before and is now replaced.

        Raises:
            UserError: a folder of another's is there, files in it were changed, or it cannot be written.
        """
        was_there = self._ensure_ours(discard_changes) if self._is_there() else False
        try:
            with tempfile.TemporaryDirectory(prefix=".slicemod-", dir=self.path.parent) as unfinished:
                new = Path(unfinished) / self.path.name
                for name, text in files.items():
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    (new / name).write_text(text, encoding="utf-8", newline="\n")
                digests = {name: _digest(new / name) for name in files}
                marker = {"slicemod": version, "files": digests}
                (new / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
                if was_there:
                    self.path.rename(Path(unfinished) / "former")
                new.rename(self.path)
        except OSError as error:
            raise UserError(f"PATH: {self.path} cannot be written: {error}. Check who may write there.") from error
        return was_there

    def remove(self, *, discard_changes: bool = False) -> None:
        """Take the folder out.

        Raises:
            UserError: there is none, it is another's, files in it were changed, or it cannot be removed.
        """
        if not self._is_there():
            raise UserError(f"PATH: expected {self.path}, which `slicemod install` makes; it is not there.")
        self._ensure_ours(discard_changes)
        try:
            with tempfile.TemporaryDirectory(prefix=".slicemod-", dir=self.path.parent) as removed:
                self.path.rename(Path(removed) / "former")  # whole or not at all, should a file be in use
        except OSError as error:
            raise UserError(f"PATH: {self.path} cannot be removed: {error}. Check who may write there.") from error

    def _is_there(self) -> bool:
        return self.path.exists() or self.path.is_symlink()

    def _ensure_ours(self, discard_changes: bool) -> bool:
        known = self._known_files()
        if known is None:
            raise UserError(
                f"PATH: expected {self.path} to be slicemod's, with a list of its files in {MARKER}; it is another's "
                "or was made by hand, and stays as it is. Move it elsewhere."
            )
        files = {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if not file.is_dir()}
        others = sorted(
            name
            for name in files - {MARKER}
            if _CACHE not in name.split("/")[:-1] and known.get(name) != _digest(self.path / name)
        )
        if others and not discard_changes:
            raise UserError(
                f"PATH: expected {self.path} as slicemod wrote it; changed or added were {', '.join(others)}. Save "
                f"what you need, then run `{self.command} --discard-changes`."
            )
        return True

    def _known_files(self) -> dict[str, str] | None:
        """The digests of the files that slicemod wrote there; None if the folder is not slicemod's."""
        marker = self.path / MARKER
        if self.path.is_symlink() or not marker.is_file():
            return None
        try:
            files = json.loads(marker.read_text(encoding="utf-8"))["files"]
        except (ValueError, KeyError, TypeError):
            return None
        return files if isinstance(files, dict) else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
