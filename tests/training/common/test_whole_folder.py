from __future__ import annotations

from pathlib import Path

import pytest

from slicemod.training.common.whole_folder import whole_folder
from slicemod.user_error import UserError


@pytest.mark.parametrize("place", ["new/folder", "."])
def test_files_appear_when_all_are_written(place: str, tmp_path: Path) -> None:
    out = tmp_path / place
    with whole_folder(out) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text("17")
        (folder / "index").write_text("part")
        assert list(out.iterdir()) == [folder]
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*")) == ["index", "part", "part/weights"]


def write_until_full(out: Path) -> None:
    with whole_folder(out) as folder:
        (folder / "weights").write_text("17")
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("is_there", [False, True])
def test_nothing_is_left_where_writing_fails(is_there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    with pytest.raises(UserError, match=r"out cannot be written: \[Errno 28\]"):
        write_until_full(out)
    assert out.exists() == is_there
    assert not is_there or list(out.iterdir()) == []


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("17")
    with pytest.raises(UserError, match="with files in it"), whole_folder(tmp_path):
        raise AssertionError("it is refused before")
    assert [file.name for file in tmp_path.iterdir()] == ["own"]
