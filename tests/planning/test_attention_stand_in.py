"""The stand-in for attention notes what is asked of it and computes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slicemod.kernels import kernel_named
from slicemod.planning.attention_stand_in import AttentionStandIn
from slicemod.planning.cpu_temporaries import no_temporaries
from slicemod.planning.memory_timeline import AttentionCost, MemoryRecorder


def _inputs(keys: int = 5, *, requires_grad: bool = False) -> list[torch.Tensor]:
    return [
        torch.empty(2, 3, tokens, 7, device="meta", dtype=torch.float16, requires_grad=requires_grad)
        for tokens in (11, keys, keys)
    ]


def _attend(inputs: list[torch.Tensor]) -> torch.Tensor:
    query, key, value = inputs
    return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(("device_type", "upcast"), [("cpu", True), ("cuda", True), ("mps", False)])
def test_a_call_has_the_sizes_of_its_tensors(device_type: str, upcast: bool) -> None:
    recorder = MemoryRecorder(no_temporaries)
    stand_in = AttentionStandIn(recorder, device_type)
    with recorder, stand_in.installed():
        out = _attend(_inputs())
    (call,) = stand_in.calls
    shape = call.shape
    assert (shape.batch, shape.heads, shape.queries, shape.keys, shape.head_dim) == (2, 3, 11, 5, 7)
    assert (shape.itemsize, shape.upcast) == (2, upcast)
    assert (out.shape, out.device.type) == ((2, 3, 11, 7), "meta")


@pytest.mark.parametrize(
    ("device_type", "keys", "named"),
    [
        ("cpu", 5, None),
        ("cuda", 5, None),
        ("mps", 5, "all scores on Metal"),
        ("cpu", 1, "one key"),
        ("cuda", 1, "one key"),
    ],
)
def test_a_call_knows_why_it_would_not_be_fused(device_type: str, keys: int, named: str | None) -> None:
    recorder = MemoryRecorder(no_temporaries)
    stand_in = AttentionStandIn(recorder, device_type, training=True)
    with recorder, stand_in.installed():
        _attend(_inputs(keys, requires_grad=True))
    obstacle = kernel_named("fused").obstacle(stand_in.calls[0])
    assert obstacle is None if named is None else obstacle is not None and named in obstacle


def test_gradients_have_the_shapes_of_the_inputs_and_attention_works_twice() -> None:
    recorder = MemoryRecorder(no_temporaries)
    stand_in = AttentionStandIn(recorder, "cuda")
    inputs = _inputs(requires_grad=True)
    with recorder, stand_in.installed():
        torch.autograd.backward(_attend(inputs).sum())
    assert [tensor.grad.shape for tensor in inputs if tensor.grad is not None] == [tensor.shape for tensor in inputs]
    timeline = recorder.timeline(0, 0)
    assert int(timeline.works.sum()) == 2
    assert timeline.keeps[timeline.keeps != 0].tolist() == [1, -1]
    assert timeline.peak([AttentionCost(kept=10**6, working=10**7)]).attention == 11 * 10**6


def test_attention_is_itself_again_after_an_error() -> None:
    original = F.scaled_dot_product_attention
    stand_in = AttentionStandIn(MemoryRecorder(no_temporaries), "cpu")
    with pytest.raises(IndexError), stand_in.installed():
        _attend([torch.empty(7, device="meta")] * 3)
    assert F.scaled_dot_product_attention is original
