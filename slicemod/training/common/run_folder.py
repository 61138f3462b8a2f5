"""The folder of a run: its name, that it is the run's own, and what was written there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from slicemod.user_error import UserError
from slicemod.whole_file import ensure_writable_folder

RUNS = Path("runs")


def run_folder(name: str) -> Path:
    """Where the run ``name`` keeps what it writes: `runs/NAME`.

    Raises:
        UserError: the name leads out of `runs`.
    """
    path = Path(name)
    if not name.strip() or path.is_absolute() or ".." in path.parts:
        raise UserError(f"run: expected a name, of a folder under {RUNS}/, got {name!r}. Give one such as `my-dog`.")
    return RUNS / path


def unused_name(name: str) -> str:
    """``name``, or that with the first number from 2 on, of which there are no checkpoints yet."""
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not checkpoints_in(run_folder(name) / "checkpoints"))


def checkpoints_in(folder: Path) -> list[Path]:
    """What a run could be continued from."""
    return sorted(folder.glob("*.ckpt"))


class RunLock:
    """Keeps other processes out of the folders that a run writes its checkpoints to, until it is released.

    The system releases it when the process ends, however it ends: a file that is left behind locks nothing.

    Args:
        folders: of checkpoints.

    Raises:
        UserError: another process writes to one of them.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._locks: list[FileLock] = []
        for folder in folders:
            ensure_writable_folder(folder.parent)
            lock = FileLock(folder.parent / f".{folder.name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                self.release()
                raise UserError(
                    f"{folder} is in use: another process trains a run that keeps its checkpoints there. Wait for it,"
                    " or give this run another name: --run NAME."
                ) from error
            self._locks.append(lock)

    def release(self) -> None:
        """Lets others in."""
        for lock in self._locks:
            lock.release()
        self._locks = []


def require_own(folders: Sequence[Path], continued: str | None) -> None:
    """Checks that a run's folders hold no other run's checkpoints.

    Args:
        folders: of checkpoints.
        continued: the checkpoint that the run continues from.

    Raises:
        UserError: one holds a checkpoint, and the run does not continue from one there.
    """
    for folder in folders:
        found = checkpoints_in(folder)
        if not found or (continued is not None and Path(continued).resolve().parent == folder.resolve()):
            continue
        raise UserError(
            f"{folder} holds {found[0].name} of an earlier run: expected a folder without checkpoints, so that none is"
            " overwritten. Continue that run with --ckpt_path last, or give this one another name: --run NAME."
        )
