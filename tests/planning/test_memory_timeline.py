"""A timeline has every storage from its making to its end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slicemod.bench.memory import peak_memory
from slicemod.planning.cpu_temporaries import no_temporaries
from slicemod.planning.memory_timeline import AttentionCost, MemoryRecorder, Timeline


def _chain(x: Tensor) -> Tensor:
    return ((x + 1).sin() * 2).reshape(-1)[3:].clone()


def _accumulating(x: Tensor) -> Tensor:
    kept = [x * factor for factor in range(5)]
    return torch.stack(kept[1:4])


def _in_place(x: Tensor) -> Tensor:
    return (x @ x).exp_().add_(1)


def _backward(x: Tensor) -> Tensor:
    weight = x.detach().requires_grad_()
    torch.autograd.backward((weight.sigmoid() * weight).tanh().sum())
    assert weight.grad is not None
    return weight.grad


def _record(call: Callable[[Tensor], Tensor], size: int, *, gradients: bool = False) -> Timeline:
    x = torch.empty(size, size, device="meta")
    recorder = MemoryRecorder(no_temporaries)
    recorder.ignore([x])
    with recorder:
        result = call(x)
    if gradients:
        recorder.count_as_gradients([result])
    return recorder.timeline(weights=0, optimizer=0)


@pytest.mark.parametrize("call", [_chain, _accumulating, _in_place, _backward])
def test_the_peak_is_the_measured_one(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(211, 211)
    measured = peak_memory(lambda: call(x))
    assert _record(call, 211).peak([]).total == pytest.approx(measured, rel=0.001)


@pytest.mark.parametrize("call", [_chain, _accumulating, _in_place, _backward])
def test_a_size_between_two_has_the_timeline_that_is_recorded_there(call: Callable[[Tensor], Tensor]) -> None:
    small, middle, large = (_record(call, size) for size in (10, 20, 50))
    between = small.between(middle, 50**2 - 10**2, 20**2 - 10**2)
    assert torch.equal(between.activations, large.activations)
    assert between.peak([]) == large.peak([])


def test_steps_of_other_operators_have_nothing_between_them() -> None:
    with pytest.raises(ValueError, match="expected two of the same operators"):
        _record(_chain, 10).between(_record(_backward, 20), 1, 2)


def test_gradients_are_counted_apart() -> None:
    together, apart = _record(_backward, 11), _record(_backward, 11, gradients=True)
    assert int(apart.gradients.sum()) == 11 * 11 * 4
    assert torch.equal(apart.activations + apart.gradients, together.activations)
    assert apart.peak([]).total == together.peak([]).total


def test_attention_is_counted_at_its_places() -> None:
    recorder = MemoryRecorder(no_temporaries)
    with recorder:
        held = torch.empty(100, device="meta")
        marker = torch.empty(1, device="meta")
        recorder.keep_for_backward(marker, call=0)
        recorder.work(call=0)
        del held
        recorder.work(call=1)
        del marker
        last = torch.empty(150, device="meta")
    timeline = recorder.timeline(weights=7, optimizer=11)
    assert last.shape == (150,)
    peak = timeline.peak([AttentionCost(kept=1000, working=50), AttentionCost(kept=0, working=600)])
    assert peak == (7, 0, 0, 11, 1600)
    assert peak.total == 1618
    assert timeline.peak([AttentionCost(0, 0)] * 2) == (7, 600, 0, 11, 0)
    # Beside the first call 400 bytes are held, beside the second what the first one keeps.
    assert timeline.held_at_attention([AttentionCost(1000, 0), AttentionCost(0, 0)]) == 7 + 11 + 1000
    assert timeline.held_at_attention([AttentionCost(100, 0), AttentionCost(0, 0)]) == 7 + 11 + 400
