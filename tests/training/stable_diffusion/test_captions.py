from __future__ import annotations

import json
from pathlib import Path

import pytest

from slicemod.training.stable_diffusion.captions import METADATA, captions_of_metadata, read_text
from slicemod.user_error import UserError


def captions(root: Path) -> dict[str, str]:
    """The captions of the metadata of a folder, by the name of the image."""
    return {path.name: text for path, text in captions_of_metadata(root, [root / METADATA]).items()}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_and_metadata_are_read_in_every_encoding_that_is_marked(encoding: str, tmp_path: Path) -> None:
    text = "un café\nà Łódź"
    (tmp_path / "cat.txt").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert read_text(tmp_path / "cat.txt") == text
    line = json.dumps({"file_name": "é.png", "text": text}, ensure_ascii=False)
    (tmp_path / METADATA).write_text(line, encoding=encoding)
    assert captions(tmp_path) == {"é.png": text}


@pytest.mark.parametrize("mark", ["be", "le"])
def test_utf_16_is_read_in_either_order_of_bytes(mark: str, tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_bytes("\ufeffa cat".encode(f"utf-16-{mark}"))
    assert read_text(tmp_path / "cat.txt") == "a cat"


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("café".encode("latin-1"), "got other bytes"),
        ("a cat".encode("utf-16-le"), "got text with null characters"),
        (b"\xff\xfea", "got other bytes"),
    ],
)
def test_a_file_in_another_encoding_is_named(content: bytes, got: str, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(ValueError, match=f"expected UTF-8, or UTF-16 with its byte order mark, {got}"):
        read_text(tmp_path / METADATA)
    with pytest.raises(UserError, match=rf"metadata\.jsonl cannot be read: expected UTF-8.*{got}"):
        captions(tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_only_the_end_of_a_line_ends_a_line(separator: str, tmp_path: Path) -> None:
    lines = [{"file_name": f"{name}.png", "text": f"a{separator}b"} for name in "xy"]
    escaped = separator in "\v\f\x1c"  # which JSON wants escaped
    (tmp_path / METADATA).write_text(
        "\r\n\n".join(json.dumps(line, ensure_ascii=escaped) for line in lines) + "\n \n", encoding="utf-8"
    )
    assert captions(tmp_path) == {f"{name}.png": f"a{separator}b" for name in "xy"}


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "cat.png", "text": null}',
        '{"file_name": "cat.png", "text": ["a", "cat"]}',
        '{"file_name": "cat.png", "text": 7}',
        '{"file_name": "cat.png", "text": "\\ud800"}',
        '{"file_name": null, "text": "a cat"}',
        '{"file_name": "", "text": "a cat"}',
        '{"file_name": "a\\u0000/cat.png", "text": "a cat"}',
        '{"file_name": "cat.png", "text": "a cat", "text": "a dog"}',
        '{"file_name": "cat.png"}',
        "[1]",
        '"a cat"',
        "{",
        "[" * 100_000,
        "9" * 10_000,
    ],
    ids=lambda line: line[:40],
)
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_text("\n" + line, encoding="utf-8")
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2: expected an object with file_name and text") as told:
        captions(tmp_path)
    assert len(str(told.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["../cat.png", "deeper/../../cat.png", "/cat.png", "{root}/cat.png"])
def test_a_path_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    name = name.format(root=tmp_path)
    (tmp_path / METADATA).write_text(json.dumps({"file_name": name, "text": "a cat"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1: expected file_name to be a path .* below data\.folder, got") as told:
        captions(tmp_path)
    assert repr(name) in str(told.value)


def test_a_path_may_lead_through_folders_and_back(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    file = tmp_path / "deeper" / METADATA
    (tmp_path / "self").symlink_to("self")
    names = ("../cat.png", "./dog.png", "../deeper/sun.png", "../..sea.png", "../self/sky.png")
    lines = [{"file_name": name, "text": name} for name in names]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = captions_of_metadata(tmp_path, [file])
    root = tmp_path.resolve()
    places = ("cat.png", "deeper/dog.png", "deeper/sun.png", "..sea.png", "self/sky.png")
    assert set(found) == {root / place for place in places}


def test_two_captions_of_a_file_are_refused_and_one_told_twice_is_taken(tmp_path: Path) -> None:
    once, other = ({"file_name": "cat.png", "text": text} for text in ("a cat", "a dog"))
    (tmp_path / METADATA).write_text(f"{json.dumps(once)}\n{json.dumps(once)}", encoding="utf-8")
    assert captions(tmp_path) == {"cat.png": "a cat"}
    (tmp_path / METADATA).write_text(f"{json.dumps(once)}\n{json.dumps(other)}", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: expected one caption for cat.png, got another than in .* line 1\."):
        captions(tmp_path)
