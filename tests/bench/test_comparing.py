"""Comparisons: wrong peers are not timed, figures come from what was run, whatever is left out says why."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slicemod.bench import comparing
from slicemod.bench.comparing import Comparison, Measurement, Setting
from slicemod.bench.peers import SDPA, AttentionFunction, Peer, find_peers
from slicemod.bench.work import Work
from slicemod.bench.workloads import UnetWork
from slicemod.memory.free_memory import PROBES, MemoryProbe
from tests.bench.tiny import CALL, CROSS, INFERENCE, SELF, TRAINING, every_work, measure_little, write_unet

CPU = torch.device("cpu")
FEW = ["full", "diffusers-sliced", "ldm", "slicemod", "slicemod-exact"]
FOREVER = float("inf")


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_little(monkeypatch)


def compared(work: Work, peers: list[Peer], setting: Setting, rounds: int = 2) -> Comparison:
    comparison = Comparison(work, peers, setting, CPU)
    assert list(comparison.prepare()) == [peer.name for peer in peers]
    assert list(comparison.rounds(rounds, FOREVER)) == list(range(1, rounds + 1))
    return comparison


@pytest.mark.parametrize(
    "setting",
    [
        INFERENCE,
        pytest.param(TRAINING, marks=pytest.mark.slow),
        pytest.param(Setting("bfloat16", "inference"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_peer_is_measured_on_every_kind_of_work(setting: Setting, tmp_path: Path) -> None:
    for work in every_work(tmp_path):
        peers = [peer for peer in find_peers(FEW, "1MiB") if work is not CALL or peer.alone() is not None]
        comparison = compared(work, peers, setting)
        rows = comparison.measurements()
        assert comparison.left_out == []
        assert [row.peer for row in rows] == [peer.name for peer in peers]
        assert (rows[0].ratio, rows[0].spread) == (1.0, (1.0, 1.0))
        for row in rows:
            assert row.rounds == 2
            assert (row.work, row.setting) == (work.name, setting)
            assert 0 < row.output_bytes <= row.peak_bytes
            assert min(row.seconds, row.rate_share, row.product_rate, row.error) > 0


def test_the_peak_is_that_of_the_call() -> None:
    rows = {row.peer: row for row in compared(CALL, find_peers(["full"], "1MiB"), INFERENCE).measurements()}
    scores = 2 * 61 * 61 * 4
    assert 2 * scores <= rows["full"].peak_bytes < 3 * scores
    assert rows["sdpa"].peak_bytes < rows["full"].peak_bytes
    assert rows["sdpa"].output_bytes == 2 * 61 * 11 * 4


def test_a_training_step_returns_the_gradients_of_inputs_and_weights() -> None:
    (row,) = compared(CROSS, [SDPA], TRAINING).measurements()
    weights = sum(parameter.numel() for parameter in CROSS.build().parameters())
    assert row.output_bytes == 4 * (weights + 2 * 53 * 26 + 2 * 7 * 19)


def test_mixed_precision_keeps_weights_and_multiplies_in_the_half_one() -> None:
    seen: list[torch.dtype] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(query.dtype)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    comparison = compared(SELF, [SDPA, AttentionFunction("own", lambda: attend)], Setting("bfloat16-mixed", "training"))
    assert not comparison.left_out
    assert set(seen) == {torch.bfloat16}
    weights = sum(parameter.numel() for parameter in SELF.build().parameters())
    assert {row.output_bytes for row in comparison.measurements()} == {4 * (weights + 67 * 26)}


@pytest.mark.slow
def test_checkpointed_blocks_take_less_memory(tmp_path: Path) -> None:
    source = str(write_unet(tmp_path / "unet"))
    plain, checkpointed = (UnetWork(source, 128, 2, checkpoint_blocks) for checkpoint_blocks in (False, True))
    (kept,), (computed,) = (compared(work, [SDPA], TRAINING).measurements() for work in (plain, checkpointed))
    assert computed.series == "unet UNet, blocks checkpointed"
    assert computed.peak_bytes - computed.output_bytes < 0.8 * (kept.peak_bytes - kept.output_bytes)
    assert checkpointed.scores_bytes(4, training=True) == plain.scores_bytes(4, training=False)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_peer_that_is_wrong_is_not_timed(factor: float) -> None:
    def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value) * factor

    comparison = compared(SELF, [SDPA, AttentionFunction("wrong", lambda: wrong)], INFERENCE)
    assert [row.peer for row in comparison.measurements()] == ["sdpa"]
    (left_out,) = comparison.left_out
    assert left_out.peer == "wrong"
    assert "over 4 times SDPA's" in left_out.reason


def test_a_peer_that_cannot_is_left_out_with_its_own_words() -> None:
    def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError("no such kernel\nand more")

    comparison = compared(SELF, [SDPA, AttentionFunction("broken", lambda: broken)], INFERENCE)
    assert [entry.reason for entry in comparison.left_out] == ["no such kernel"]


def test_scores_and_weights_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: 40_000))
    comparison = compared(SELF, find_peers(["full", "slicemod"], "1MiB"), INFERENCE)
    assert [row.peer for row in comparison.measurements()] == ["sdpa", "slicemod"]
    assert "would hold 89,780 bytes of scores, 40,000 are free" in comparison.left_out[0].reason
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: 10_000))
    half = Setting("bfloat16", "inference")  # whose weights are made in float32 first
    comparison = Comparison(SELF, find_peers(["full"], "1MiB"), half, CPU)
    assert not [*comparison.prepare(), *comparison.rounds(2, FOREVER), *comparison.measurements()]
    assert {entry.peer for entry in comparison.left_out} == {"sdpa", "full"}


def test_rounds_end_when_time_is_up_but_one_is_always_run() -> None:
    comparison = Comparison(SELF, [SDPA], INFERENCE, CPU)
    list(comparison.prepare())
    assert list(comparison.rounds(5, time.monotonic() - 1)) == [1]
    assert [row.rounds for row in comparison.measurements()] == [1]


def test_what_stops_a_round_leaves_the_rounds_before() -> None:
    calls = 0

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # a check, a peak, two rounds
            raise KeyboardInterrupt
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    comparison = Comparison(SELF, [SDPA, AttentionFunction("stops", lambda: attend)], INFERENCE, CPU)
    list(comparison.prepare())
    with pytest.raises(KeyboardInterrupt):
        list(comparison.rounds(5, FOREVER))
    assert [(row.peer, row.rounds) for row in comparison.measurements()] == [("sdpa", 2), ("stops", 2)]


def test_ratios_are_medians_over_rounds_not_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # sdpa, other and product; every second round turns the order of the peers round
    ticks = iter([9.0, 1.0, 2.0, 1.0, 12.0, 4.0, 2.0, 1.0, 5.0, 4.0])
    monkeypatch.setattr(comparing, "seconds_of", lambda call, device: next(ticks))
    other = AttentionFunction("other", lambda: torch.nn.functional.scaled_dot_product_attention)
    comparison = compared(SELF, [SDPA, other], INFERENCE, rounds=3)
    rows: dict[str, Measurement] = {row.peer: row for row in comparison.measurements()}
    assert rows["other"].ratio == 3.0  # of 2/1, 12/4 and 5/1
    assert rows["other"].spread == (2.5, 4.0)
    assert rows["sdpa"].seconds == 1.0
    assert rows["sdpa"].product_rate == 2 * 67**3 / 2
    flops = SELF.flops(training=False)
    assert rows["sdpa"].rate_share == pytest.approx(flops / (2 * 67**3))  # of 1/1, 2/4 and 4/1


@pytest.mark.slow
def test_compiled_peers_are_measured() -> None:
    comparison = compared(SELF, find_peers(["slicemod-exact"], "1MiB"), Setting("float32", "training", True))
    assert comparison.left_out == []
    assert len(comparison.measurements()) == 2
