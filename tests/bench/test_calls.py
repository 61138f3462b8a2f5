"""Bare calls: every peer gets the call's mask and options, and float64 checks it with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slicemod.bench.calls import CallWork, calls_of, plain_call
from slicemod.bench.comparing import Comparison
from slicemod.bench.peers import FULL, SDPA, AttentionFunction, find_peers
from slicemod.call import AttentionShape
from tests.bench.tiny import TRAINING, measure_little

SHAPE = AttentionShape(3, 4, 61, 53, 11, 4)
CALLS = [
    CallWork("padding", 64, SHAPE, mask="padding"),
    CallWork("heads", 64, SHAPE, mask="heads"),
    CallWork("learned", 64, SHAPE, mask="learned"),
    CallWork("causal", 64, AttentionShape(3, 4, 61, 61, 11, 4, causal=True)),
    CallWork("grouped", 64, AttentionShape(3, 4, 61, 53, 11, 4, key_heads=2)),
    CallWork("dropout", 64, AttentionShape(3, 4, 61, 53, 11, 4, dropout=True), dropout=0.1),
]


@pytest.mark.parametrize("work", CALLS, ids=lambda work: work.series)
def test_float64_checks_a_call_with_its_mask_and_options(work: CallWork) -> None:
    inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in work.inputs())
    (check,) = work.exact(work.build(), inputs)
    for peer in (FULL, SDPA, *find_peers(["slicemod"], "1MiB")):
        module = work.computed_by(peer, work.build())
        assert module is not None
        torch.testing.assert_close(module(*check.args)[..., check.rows, :], check.wanted, rtol=1e-9, atol=1e-9)


def test_the_timed_call_drops_weights_and_the_checked_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_little(monkeypatch)
    seen: list[float] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
        seen.append(dropout_p)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)

    comparison = Comparison(CALLS[-1], [SDPA, AttentionFunction("own", lambda: attend)], TRAINING, torch.device("cpu"))
    assert [*comparison.prepare(), *comparison.rounds(2, float("inf"))] == ["sdpa", "own", 1, 2]
    assert seen == [0.0, 0.1, 0.1, 0.1]  # checked, its peak, two rounds


@pytest.mark.parametrize(("mask", "with_gradient"), [("heads", False), ("learned", True)])
def test_only_a_learned_mask_gets_a_gradient(mask: str, with_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_little(monkeypatch)
    (work,) = (call for call in CALLS if call.mask == mask)
    comparison = Comparison(work, [SDPA], TRAINING, torch.device("cpu"))
    assert [*comparison.prepare(), *comparison.rounds(1, float("inf"))] == ["sdpa", 1]
    (row,) = comparison.measurements()
    gradients = 3 * 4 * 11 * (61 + 2 * 53) + with_gradient * 4 * 61 * 53
    assert row.output_bytes == 4 * gradients


def test_peers_with_other_options_are_left_out_of_calls_with_any() -> None:
    for name in ("memory-efficient", "flex"):
        (peer,) = (peer for peer in find_peers([name], "1MiB") if peer is not SDPA)
        if peer.missing(torch.device("cpu")) is None:
            module = peer.alone()
            assert module is not None
            with pytest.raises(ValueError, match="is not measured with is_causal"):
                module(*CALLS[3].inputs())


def test_every_kind_of_call_is_there_at_every_size() -> None:
    works = calls_of([64, 128])
    assert [(work.series, work.size, work.shape.queries) for work in works][:4] == [
        ("padding mask on 77 keys, 8x40", 64, 64),
        ("padding mask on 77 keys, 8x40", 128, 256),
        ("padding mask on 256 keys, 8x64", 64, 16),
        ("padding mask on 256 keys, 8x64", 128, 64),
    ]
    assert len(works) == len({work.name for work in works}) == 2 * 10
    assert {work.series for work in works if work.training_only} == {
        "mask with a gradient, 8x64", "dropout of a tenth, 8x64"
    }  # fmt: skip
    assert (works[-1].shape.batch, works[-1].shape.queries) == (256, 16)


def test_a_plain_call_has_tokens() -> None:
    assert (plain_call(61, 2, 11).name, plain_call(61, 2, 11).training_only) == (
        "attention, 2 heads of 11, 61 tokens", False
    )  # fmt: skip
