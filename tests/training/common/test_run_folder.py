"""A run has a folder of its own: two of them never write to one place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slicemod.training.common.run_folder import RunLock, require_own, run_folder, unused_name
from slicemod.user_error import UserError

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from slicemod.training.common.run_folder import RunLock
lock = RunLock([Path("runs/dog/checkpoints")])
print("locked", flush=True)
time.sleep(600)
"""


def test_a_folder_that_another_process_trains_in_is_refused_until_that_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = Path("runs/dog/checkpoints")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=r"runs/dog/checkpoints is in use: another process .* --run NAME"):
            RunLock([checkpoints])
        RunLock([Path("runs/cat/checkpoints")]).release()
        other.kill()  # leaves its file behind
    assert (tmp_path / "runs" / "dog" / ".checkpoints.lock").exists()
    lock = RunLock([checkpoints])
    with pytest.raises(UserError, match="in use"):
        RunLock([checkpoints])
    lock.release()
    RunLock([checkpoints]).release()


def test_a_run_that_cannot_have_all_its_folders_holds_none(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    held = RunLock([second])
    with pytest.raises(UserError, match="b is in use"):
        RunLock([first, second])
    RunLock([first]).release()
    held.release()


@pytest.mark.parametrize("name", ["last.ckpt", "previous.ckpt", "last-v1.ckpt"])
def test_a_folder_with_checkpoints_belongs_to_the_run_that_continues_from_them(name: str, tmp_path: Path) -> None:
    folder, other = tmp_path / "one", tmp_path / "two"
    for place in (folder, other):
        place.mkdir()
    require_own([folder], None)
    (folder / name).touch()
    (other / name).touch()
    require_own([folder], str(folder / name))
    for continued in (None, str(other / name)):
        with pytest.raises(UserError, match=rf"one holds {name} of an earlier run: .* --ckpt_path last, or .* --run"):
            require_own([folder], continued)


@pytest.mark.parametrize("name", ["", " ", "../other", "/tmp/other", "a/../../b"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="run: expected a name, of a folder under runs/"):
        run_folder(name)


def test_an_unused_name_is_the_first_without_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert unused_name("dog") == "dog"
    for name in ("dog", "dog-2"):
        (run_folder(name) / "checkpoints").mkdir(parents=True)
        (run_folder(name) / "checkpoints" / "last.ckpt").touch()
    assert unused_name("dog") == "dog-3"
