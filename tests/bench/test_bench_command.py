"""`slicemod bench`: what it prints and writes, what Ctrl-C leaves, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slicemod.bench import bench_command
from slicemod.bench.bench_command import run
from slicemod.bench.comparing import Comparison
from slicemod.bench.results import load_results
from slicemod.user_error import UserError
from tests.bench.tiny import made_up_results, measure_little, write_unet


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_little(monkeypatch)


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments that measure one layer and a UNet of a small model."""
    model = write_unet(tmp_path / "unet")
    few = ["--peers", "full", "slicemod", "--resolution", "64", "--largest", "1", "--rounds", "2"]
    return ["bench", "--work", f"{model}-layers", f"{model}-unet", *few]


@pytest.mark.slow
def test_tables_json_and_pictures_say_the_same(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    arguments = [*tiny, "--mode", "training", "inference", "--json", str(out), "--plots", str(tmp_path / "plots")]
    assert run(arguments) == 0
    first = capsys.readouterr().out
    results = load_results(out)
    assert results.command == arguments[1:]
    assert results.machine["versions"]["torch"] == torch.__version__
    assert results.machine["threads"] == torch.get_num_threads()
    assert len(results.measurements) == 2 * 2 * 3  # works, modes, peers
    assert len(list((tmp_path / "plots").iterdir())) == 3  # of each work, and of both
    assert run(["bench", "--from", str(out)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[:20] == first.strip().splitlines()[:20]


def test_calls_that_only_train_are_not_measured_in_inference(tmp_path: Path) -> None:
    out = tmp_path / "calls.json"
    few = ["--resolution", "64", "--rounds", "1", "--peers", "slicemod"]
    assert run(["bench", "--work", "calls", *few, "--json", str(out)]) == 0
    results = load_results(out)
    assert results.left_out == []
    modes: dict[str, set[str]] = {}
    for row in results.measurements:
        modes.setdefault(row.series, set()).add(row.setting.mode)
    assert len(modes) == 10
    assert {series for series, found in modes.items() if found == {"training"}} == {
        "mask with a gradient, 8x64", "dropout of a tenth, 8x64"
    }  # fmt: skip


def test_growth_measures_bare_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "growth.json"
    assert run(["bench", "--growth", "--tokens", "61", "127", "--rounds", "1", "--json", str(out)]) == 0
    assert "time / N²" in capsys.readouterr().out
    rows = load_results(out).measurements
    assert {(row.size, row.unit, row.setting.mode) for row in rows} == {
        (61, "tokens", "inference"), (127, "tokens", "inference")
    }  # fmt: skip
    assert {row.peer for row in rows} == set(bench_command.GROWTH_PEERS)


def test_growth_runs_all_sizes_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, done = Comparison.rounds, []

    def noted(comparison: Comparison, count: int, until: float) -> Iterator[int]:
        for turn in rounds(comparison, count, until):
            done.append((comparison.setting.dtype, turn, comparison.work.size))
            yield turn

    monkeypatch.setattr(Comparison, "rounds", noted)
    few = ["--tokens", "61", "127", "--rounds", "2", "--dtype", "float32", "bfloat16"]
    assert run(["bench", "--growth", "--peers", "slicemod", *few]) == 0
    assert done == [(dtype, turn, size) for dtype in ("float32", "bfloat16") for turn in (1, 2) for size in (61, 127)]


def test_ctrl_c_keeps_the_rounds_that_were_done(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, begun = Comparison.rounds, 0

    def interrupted(comparison: Comparison, count: int, until: float) -> Iterator[int]:
        nonlocal begun
        begun += 1
        for turn in rounds(comparison, count, until):
            yield turn
            if begun == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "rounds", interrupted)
    out = tmp_path / "bench.json"
    assert run([*tiny, "--mode", "inference", "--json", str(out)]) == 0
    assert "interrupted: what was measured so far follows" in capsys.readouterr().out
    rows = load_results(out).measurements
    assert [row.rounds for row in rows] == [2, 2, 2, 1, 1, 1]


def test_json_is_written_after_every_comparison(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, prepare, seen = tmp_path / "bench.json", Comparison.prepare, []

    def noting(comparison: Comparison) -> Iterator[str]:
        seen.append(len(json.loads(out.read_text())["measurements"]) if out.exists() else 0)
        yield from prepare(comparison)

    monkeypatch.setattr(Comparison, "prepare", noting)
    assert run([*tiny, "--mode", "inference", "--json", str(out)]) == 0
    assert seen == [0, 3]


def test_nothing_begins_after_the_time_is_up(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*tiny, "--minutes", "1e-9"]) == 0
    assert capsys.readouterr().out.count("out of time") == 4


def test_a_page_gets_its_figures_and_pictures_from_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "page.md"
    (page.parent / "runs").mkdir(parents=True)
    made_up_results().save(page.parent / "runs" / "one.json")
    blocks = [f"<!-- slicemod bench runs/one.json {form} -->\n<!-- end -->\n" for form in ("peers", "trade")]
    page.write_text("\n".join(blocks))
    assert run(["bench", "--render", str(page)]) == 0
    assert "| sdpa | 512.00&nbsp;(51.2&nbsp;s)<br>4.4&nbsp;MiB |" in page.read_text()
    assert (page.parent / "images" / "runs" / "one-trade.png").exists()
    assert capsys.readouterr().out.count("written to") == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more; got 0"),
        (["--batch", "0"], "--batch"),
        (["--minutes", "0"], "--minutes"),
        (["--json", "no/such/folder/b.json"], "--json: expected a file in a folder that exists; got no/such"),
        (["--dtype", "int8"], "--dtype"),
        (["--mode", "sleeping"], "--mode"),
        (["--budget", "lots"], "--budget: .*got 'lots'"),
        (["--peers", "nobody"], "--peers: .*got 'nobody'"),
        (["--work", "sd99-layers"], "sd99"),
        (["--resolution", "500"], "--resolution: expected multiples of 64"),
        (["--render", "missing.md"], "missing.md"),
        (["--from", "missing.json"], "missing.json"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(["bench", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"--device: .*sees no CUDA GPU"):
        run(["bench", "--device", "cuda"])
