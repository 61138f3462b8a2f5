"""A file is there whole or as it was before, and its folder is one that can be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slicemod.user_error import UserError
from slicemod.whole_file import ensure_writable_folder, replacing


def fail_halfway(path: Path) -> None:
    path.write_text("half of", encoding="utf-8")
    raise OSError("no space left")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("old")
    with pytest.raises(UserError, match=r"picture\.png cannot be written"), replacing(path) as temporary:
        fail_halfway(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The folder .*file/inside cannot be written"):
        ensure_writable_folder(tmp_path / "file" / "inside")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        ensure_writable_folder(tmp_path)


def test_the_old_file_keeps_its_name_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = tmp_path / "state.txt", tmp_path / "state-before.txt"
    path.write_text("old")
    synchronize = os.fsync

    def seen_meanwhile(descriptor: int) -> None:
        assert path.read_text() == "old"
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", seen_meanwhile)
    with replacing(path, keep_as=kept) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), kept.read_text()) == ("new", "old")
