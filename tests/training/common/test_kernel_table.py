"""A resumed run chooses kernels by its checkpoint's table, whatever this machine's is, and computes the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slicemod.kernels.crossover_table import Corner, CrossoverTable, Row, table_of
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.table_in_use import built_in_table, table_in_use, using_table
from slicemod.training.common.checkpoints import CheckpointError, read_checkpoint
from slicemod.training.common.kernel_table import STORED_TABLE, checkpoints_table
from tests.training.tiny import train_tiny

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"no native kernel: {native_obstacle()}")


def same_everywhere(*corners: Corner) -> CrossoverTable:
    """A table with these corners for every class of calls."""
    assert LIBRARY is not None
    built_in = built_in_table(LIBRARY)
    return replace(built_in, rows=tuple(Row(row.calls, corners) for row in built_in.rows))


@pytest.fixture
def always() -> CrossoverTable:
    """By which the native kernel runs wherever it can."""
    return same_everywhere(Corner(1, 1, 0))


@pytest.fixture
def never() -> CrossoverTable:
    """By which it never runs."""
    return same_everywhere()


def same(first: Path, second: Path) -> bool:
    weights = [read_checkpoint(path)["state_dict"] for path in (first, second)]
    return all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_a_run_resumed_on_a_machine_with_another_table_computes_the_same_bits(
    base_run: Path,
    always: CrossoverTable,
    never: CrossoverTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SLICEMOD_TABLE", raising=False)
    autoencoder = Path("runs/digits/autoencoder.safetensors")

    def folder(name: str) -> Path:
        made = tmp_path / name
        (made / autoencoder).parent.mkdir(parents=True)
        (made / autoencoder).write_bytes((base_run / autoencoder).read_bytes())
        monkeypatch.chdir(made)
        return made

    with using_table(always, "a test"):
        uninterrupted = train_tiny(folder("uninterrupted"))
        for name in ("resumed", "pinned"):
            begun = train_tiny(folder(name), "--trainer.max_steps", "2")
            assert table_of(read_checkpoint(begun)[STORED_TABLE], "it") == always
    with using_table(never, "another machine"):
        monkeypatch.chdir(tmp_path / "resumed")
        capsys.readouterr()
        resumed = train_tiny(tmp_path / "resumed", "--ckpt_path", "last")
        assert "kernels are chosen by the checkpoint's table" in capsys.readouterr().err
        assert table_in_use().table == never  # as before the run
        monkeypatch.chdir(tmp_path / "pinned")
        monkeypatch.setenv("SLICEMOD_TABLE", "that-of-another-machine.json")
        pinned = train_tiny(tmp_path / "pinned", "--ckpt_path", "last")
        assert "chosen by SLICEMOD_TABLE=that-of-another-machine.json, and not by" in capsys.readouterr().err
    assert same(resumed, uninterrupted)
    assert table_of(read_checkpoint(resumed)[STORED_TABLE], "it") == always
    assert not same(pinned, uninterrupted)
    assert table_of(read_checkpoint(pinned)[STORED_TABLE], "it") == never


def said_of(stored: dict[str, Any], own: CrossoverTable) -> tuple[CrossoverTable, str | None]:
    """The table by which a run chooses, and what it says, on a machine with the table `own`."""
    with using_table(own, "tuned.json"):
        context, said = checkpoints_table(stored, "last.ckpt")
        with context:
            return table_in_use().table, said


def test_nothing_is_said_where_the_tables_agree(always: CrossoverTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLICEMOD_TABLE", raising=False)
    elsewhere = replace(always, processor="another", measured="2020-01-01")
    assert said_of({}, always) == (always, None)
    assert said_of({STORED_TABLE: elsewhere.as_dict()}, always) == (always, None)


def test_a_table_for_other_vectors_is_left_and_this_is_said(
    always: CrossoverTable, never: CrossoverTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLICEMOD_TABLE", raising=False)
    stored = replace(never, vectors="vectors of Mars")
    table, said = said_of({STORED_TABLE: stored.as_dict()}, always)
    assert table == always
    assert "chosen by this machine's (tuned.json: " in str(said)
    assert "trained with vectors of Mars, and other bits follow" in str(said)


def test_a_checkpoints_table_of_another_version_is_refused_but_for_a_pinned_one(
    always: CrossoverTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLICEMOD_TABLE", raising=False)
    stored = {STORED_TABLE: always.as_dict() | {"format": 2}}
    with pytest.raises(CheckpointError, match=r"table of kernels in last\.ckpt: .*format 2.*SLICEMOD_TABLE=built-in"):
        checkpoints_table(stored, "last.ckpt")
    monkeypatch.setenv("SLICEMOD_TABLE", "built-in")
    table, said = said_of(stored, always)
    assert table == always
    assert "format 2" in str(said)
