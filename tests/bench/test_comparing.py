"""Peers compute the same layer, wrong ones are not timed, and figures come from what was run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench import bench_command, comparing
from slicemod.bench.comparing import Measurement, compare, flops
from slicemod.bench.peers import Workload, make_layer, oracle, peers_of
from slicemod.user_error import UserError

SMALL = (Workload("self", 1, 67, 26, 2, 13), Workload("cross", 2, 53, 26, 2, 13, (7, 19)))


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.name)
def test_every_peer_computes_the_layer(work: Workload) -> None:
    layer = make_layer(work)
    x = torch.randn(work.batch, work.queries, work.channels)
    context = None if work.context is None else torch.randn(work.batch, *work.context)
    wanted = oracle(work, layer)(x.double(), None if context is None else context.double())
    found = peers_of(work, layer)
    assert next(iter(found)) == "SDPA"
    assert set(found) == {"SDPA", "full attention", "diffusers slicing", "slicemod auto", "slicemod math"}
    for peer in found.values():
        torch.testing.assert_close(peer(x, context).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_measurements_cover_every_peer(training: bool) -> None:
    results = list(compare(SMALL[0], torch.float32, training=training, rounds=2, rate=1e9))
    measured = [result for result in results if isinstance(result, Measurement)]
    assert len(results) - len(measured) == 3  # a warm-up and two rounds
    assert [row.ratio for row in measured if row.peer == "SDPA"] == [1.0]
    assert all(row.peak_bytes > 0 and row.seconds > 0 and row.training == training for row in measured)


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor, _context: Tensor | None) -> Tensor:
            return x

    def with_a_wrong_one(work: Workload, layer: MemoryAwareCrossAttention) -> dict[str, nn.Module]:
        return {**peers_of(work, layer), "wrong": Wrong()}

    monkeypatch.setattr(comparing, "peers_of", with_a_wrong_one)
    results = compare(SMALL[0], torch.float32, training=False, rounds=1, rate=1e9)
    assert "wrong" not in {result.peer for result in results if isinstance(result, Measurement)}


def test_flops_count_projections_and_attention() -> None:
    # to_q and to_out on 53 queries, to_k and to_v on 7 tokens of 19 channels, two products of 53 x 7 over 26 channels
    forward = 2 * 2 * (2 * 53 * 26 * 26 + 2 * 7 * 19 * 26 + 2 * 53 * 7 * 26)
    assert flops(SMALL[1], training=False) == forward
    assert flops(SMALL[1], training=True) == 3 * forward


def test_bench_prints_tables_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_command, "QUICK_WORKLOADS", SMALL)
    monkeypatch.setattr(comparing, "RATE_SIZE", 67)
    out = tmp_path / "bench.json"
    assert bench_command.run(["bench", "--quick", "--rounds", "1", "--json", str(out)]) == 0
    assert "slicemod auto" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert len(written["measurements"]) == 2 * 2 * 5  # workloads, modes, peers


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--json", "no/such/folder/b.json"], ["--dtype", "int8"]])
def test_bad_arguments_are_named(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=arguments[0]):
        bench_command.run(["bench", *arguments])
