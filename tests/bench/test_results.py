"""Results come back from their JSON as they were; a file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slicemod.bench.results import load_results
from slicemod.user_error import UserError
from tests.bench.tiny import made_up_results


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    results, path = made_up_results(), tmp_path / "results.json"
    results.save(path)
    assert load_results(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_comparisons_are_told_apart_by_work_and_setting() -> None:
    found = [(work, [row.peer for row in rows]) for work, _, rows in made_up_results().comparisons()]
    assert found[:2] == [
        ("layer, 256 px", ["sdpa", "slicemod", "full"]),
        ("layer, 512 px", ["sdpa", "slicemod", "full"]),
    ]
    assert [work for work, _ in found[2:]] == [f"attention, {size} tokens" for size in (1024, 2048, 4096)]


def test_a_digest_tells_results_apart() -> None:
    results, other = made_up_results(), made_up_results()
    assert results.digest == other.digest
    other.measurements.pop()
    assert results.digest != other.digest


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r" cannot be written: expected the name of a file, got a folder"):
        made_up_results().save(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 0}', '{"format": 1, "measurements": [{"peer": 1}]}'])
def test_a_file_of_something_else_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"other\.json: expected a JSON of `slicemod bench --json`"):
        load_results(path)


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    made_up_results().save(path)
    read = json.loads(path.read_text())
    del read["measurements"][0]["peak_bytes"]
    path.write_text(json.dumps(read))
    with pytest.raises(UserError, match="peak_bytes"):
        load_results(path)
