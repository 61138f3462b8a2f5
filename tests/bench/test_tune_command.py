"""`slicemod tune`: it writes what it found where it says, takes it away again, and keeps nothing of noise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slicemod.bench.duel import Ratio
from slicemod.bench.tune_command import run
from slicemod.bench.tuned_calls import TunedCall
from slicemod.call import AttentionShape, CallSpec
from slicemod.cli import main
from slicemod.kernels.crossover_table import read_table
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.user_error import UserError

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"no native kernel: {native_obstacle()}")


def faster(call: TunedCall, kernel: str, rival: str) -> Ratio:
    return Ratio(0.53, 0.51, 0.57)


def noise(call: TunedCall, kernel: str, rival: str) -> Ratio:
    return Ratio(0.53, 0.11, 1.57)


def test_it_writes_a_table_and_says_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    assert run(["tune", "--output", str(path)], faster) == 0
    told = capsys.readouterr()
    assert "float32 training, plain, heads to 64" in told.out
    assert "0.53 to 0.53 of fused" in " ".join(told.out.split())
    assert f"SLICEMOD_TABLE={path}" in told.out
    table = read_table(path)
    assert table.threads == torch.get_num_threads()
    assert LIBRARY is not None
    assert table.native == LIBRARY.path.stem
    assert table.is_faster("native", CallSpec.planned(AttentionShape(1, 8, 61, 67, 40, 4), "cpu"))


def test_json_has_the_table_and_every_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    assert run(["tune", "--output", str(path), "--json"], faster) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path)
    assert told["table"] == json.loads(path.read_text())
    assert {measured["ratio"]["median"] for measured in told["measured"]} == {0.53}


def test_nothing_is_kept_of_noise(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(UserError, match=r"expected an idle machine; only 0 of .* nothing is kept"):
        run(["tune", "--output", str(path)], noise)
    assert list(tmp_path.iterdir()) == []


def test_reset_removes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    path.write_text("")
    for said in (f"removed {path}; the built-in table serves", "the built-in table serves already"):
        assert main(["tune", "--reset", "--output", str(path)]) == 0
        assert capsys.readouterr().out.strip() == said
        assert not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "--seconds: expected more than 0; got 0"),
        (["--output", "nowhere/table.json"], "--output: expected a file in a folder that exists"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(["tune", *options], faster)


@pytest.mark.slow
def test_the_next_process_chooses_by_it(tmp_path: Path) -> None:
    """`slicemod kernels` in processes of their own, with a copy of the compiled library in a cache of the test's."""
    assert LIBRARY is not None
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for file in LIBRARY.path.parent.glob(f"{LIBRARY.path.stem}.*"):
        shutil.copy(file, cache)
    environment = {**os.environ, "SLICEMOD_CACHE": str(cache), "OMP_NUM_THREADS": "1", "SLICEMOD_TABLE": ""}
    kernels = ["kernels", "--model", "sd15", "--device", "cpu", "--json"]
    never = (
        "import sys; from slicemod.bench import tune_command as command; from slicemod.bench.duel import Ratio;"
        "sys.exit(command.run(['tune', '--json'], lambda *_: Ratio(2.0, 1.9, 2.1)))"
    )
    tuned = subprocess.run([sys.executable, "-c", never], env=environment, capture_output=True, text=True, check=True)
    path = json.loads(tuned.stdout)["path"]
    assert Path(path).parent == cache.resolve()
    for pinned, source in (("", path), ("built-in", "built-in")):
        command = [sys.executable, "-m", "slicemod.cli", *kernels]
        ran = subprocess.run(
            command, env={**environment, "SLICEMOD_TABLE": pinned}, capture_output=True, text=True, check=True
        )
        told = json.loads(ran.stdout)
        assert told["table"]["source"] == source
        chosen = {layer["kernel"] for layer in told["models"][0]["layers"] if not layer["training"]}
        assert ("native" in chosen) == (pinned == "built-in")
    Path(path).write_text("{}", encoding="utf-8")
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert f"slicemod kernels: {path}: expected a table of format 1" in ran.stderr
