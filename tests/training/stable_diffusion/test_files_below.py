from __future__ import annotations

from pathlib import Path

from slicemod.training.stable_diffusion.files_below import files_below


def test_files_of_linked_folders_are_found_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "own", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.png").touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere / "deep")
    (root / "alias").symlink_to(root / "own")
    (root / "file.png").symlink_to(elsewhere / "deep" / "a.png")
    files, unreadable = files_below(root)
    assert files == [root / "again" / "a.png", root / "file.png", root / "own" / "a.png"]
    assert not unreadable


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "deep" / "self").symlink_to("self")
    (tmp_path / "deep" / "a.png").touch()
    assert files_below(tmp_path).files == [tmp_path / "deep" / "a.png", tmp_path / "deep" / "self"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    files, unreadable = files_below(tmp_path / "gone")
    assert not files
    assert unreadable == [(tmp_path / "gone", "the folder cannot be read: No such file or directory")]
