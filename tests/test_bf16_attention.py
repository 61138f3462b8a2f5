"""Products in bfloat16 are as exact as SDPA, whatever the scores, and take the memory that their plan says."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.bench.memory import peak_memory
from slicemod.bf16_kernel import bf16_forward
from slicemod.bf16_shape import Bf16Tiles, bf16_tiles
from slicemod.half_plan import bf16_plan
from slicemod.math_kernel import Call
from slicemod.plan import SlicePlan
from slicemod.shapes import AttentionShape, MaskShape
from slicemod.sliced import planned_attention, sliced_attention
from tests.oracle import Attention, Inputs, assert_as_exact_as_sdpa, layer_inputs, results

BF16 = torch.bfloat16


def by(heads: int, rows: int) -> Attention:
    """Attention in turns of `heads` heads by `rows` rows."""
    return functools.partial(sliced_attention, plan=SlicePlan("query", 1, rows, 0, "bf16", "test", heads, rows))


@pytest.mark.parametrize("turn", [(1, 61), (2, 61), (3, 23), (4, 61), (6, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("key_heads", [None, 1, 2])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0, 4.0, 9.0])
def test_it_is_as_exact_as_sdpa_however_far_scores_spread(
    spread: float, key_heads: int | None, turn: tuple[int, int]
) -> None:
    inputs = layer_inputs(BF16, heads=6, keys=173, key_heads=key_heads)
    inputs.query, inputs.key = inputs.query * math.sqrt(spread), inputs.key * math.sqrt(spread)
    assert_as_exact_as_sdpa(by(*turn), inputs)


@pytest.mark.parametrize("offset", [-300.0, -20.0, 20.0, 300.0])
def test_a_common_offset_of_a_rows_scores_costs_no_accuracy(offset: float) -> None:
    inputs = layer_inputs(BF16, heads=6, keys=173, width=16)
    inputs.query[..., 0] = 4
    inputs.key[..., 0] = offset
    assert_as_exact_as_sdpa(by(2, 23), inputs)


@pytest.mark.parametrize("keys", [307, 1031])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_rows_with_a_peak_that_the_sample_misses_are_computed_again(keys: int, share: float) -> None:
    inputs = layer_inputs(BF16, batch=1, heads=2, queries=211, keys=keys, width=16)
    peaked = torch.rand(211) < share
    inputs.query[:, :, peaked, 0] += 9
    inputs.key[:, :, 2::101, 0] += 9  # an odd step over the keys misses these
    assert_as_exact_as_sdpa(by(1, 53), inputs)


def test_weights_beyond_the_range_of_bfloat16_are_computed_again() -> None:
    inputs = layer_inputs(BF16, batch=1, heads=2, queries=31, keys=1031, width=16)
    inputs.query[..., 0] = 40
    inputs.key[:, :, 2, 0] = 40  # scores of 400
    # All weight is on one key. SDPA's output is then that value, and its gradient zero; ours are so but for rounding.
    assert_as_exact_as_sdpa(by(2, 31), inputs, ulps=4)


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_the_scale_is_a_factor_of_the_scores(scale: float) -> None:
    assert_as_exact_as_sdpa(by(2, 23), layer_inputs(BF16, scale=scale))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_is_left_to_others(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    inputs = layer_inputs(BF16, keys=521)
    plan = planned_attention(inputs.query, inputs.key, inputs.value, scale=scale)[1]
    assert plan is not None
    assert plan.kernel == "fused"


@st.composite
def calls(draw: st.DrawFn) -> tuple[Inputs, Attention]:
    small = st.integers(1, 7)
    heads, key_heads = draw(small), None
    if heads % 2 == 0 and draw(st.booleans()):
        key_heads = heads // 2
    torch.manual_seed(draw(st.integers(0, 99)))
    inputs = layer_inputs(
        BF16,
        batch=draw(st.integers(1, 3)),
        heads=heads,
        queries=draw(st.integers(1, 71)),
        keys=draw(st.integers(2, 71)),
        width=draw(st.integers(1, 19)),
        key_heads=key_heads,
    )
    if draw(st.booleans()):
        inputs.value = torch.randn(*inputs.value.shape[:3], draw(small)).to(BF16)
    return inputs, by(draw(st.integers(1, 9)), draw(st.integers(1, 80)))


@given(call=calls())
def test_any_call_in_any_turns_is_as_exact_as_sdpa(call: tuple[Inputs, Attention]) -> None:
    inputs, attention = call
    assert_as_exact_as_sdpa(attention, inputs, ulps=4)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_and_inf_go_where_sdpa_sends_them(which: str, special: float) -> None:
    inputs = layer_inputs(BF16, batch=1)
    getattr(inputs, which)[0, 1, 5, 3] = special
    with sdpa_kernel(SDPBackend.MATH):
        ours, theirs = inputs.run(by(2, 23)), inputs.run(F.scaled_dot_product_attention)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


def test_gradients_that_nobody_asked_for_are_left_out() -> None:
    for name in ("query", "key", "value"):
        inputs = layer_inputs(BF16)
        tensor = getattr(inputs, name).requires_grad_()
        output = inputs.run(by(2, 23))
        (alone,) = torch.autograd.grad(output, [tensor], torch.ones_like(output))
        everything = results(by(2, 23), inputs.leaves(), torch.ones_like(output))
        assert torch.equal(alone, everything[name])


def test_gradients_can_be_differentiated_again() -> None:
    inputs = layer_inputs(BF16).leaves()
    output = inputs.run(by(2, 23))
    (gradient,) = torch.autograd.grad(output.float().square().sum(), [inputs.query], create_graph=True)
    (second,) = torch.autograd.grad(gradient.float().square().sum(), [inputs.key])
    assert second.isfinite().all()
    assert float(second.abs().max()) > 0


def test_under_autocast_it_stays_as_exact() -> None:
    inputs = layer_inputs(BF16, keys=173)
    with torch.autocast("cpu", torch.bfloat16):
        ours = inputs.run(by(2, 23))
    assert torch.equal(ours, inputs.run(by(2, 23)))


def measured_peak(inputs: Inputs, attention: Attention, *, training: bool) -> int:
    """Peak bytes beyond inputs, output and input gradients."""
    leaves = inputs.leaves()
    wanted = [leaves.query, leaves.key, leaves.value]

    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    with torch.set_grad_enabled(training):
        output = leaves.run(attention)
        grad = torch.ones_like(output)
        peak = peak_memory(lambda: leaves.run(attention)) - size([output])
        if training:
            step = peak_memory(lambda: torch.autograd.grad(leaves.run(attention), wanted, grad))
            peak = max(peak, step - size(wanted) - size([output]))
    return peak


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("heads", "rows"), [(1, 61), (2, 128), (5, 509)])
@pytest.mark.parametrize("peaked", [False, True])
def test_the_peak_is_what_the_tiles_say(peaked: bool, heads: int, rows: int, training: bool) -> None:
    inputs = layer_inputs(BF16, heads=5, queries=509, keys=613, width=40)
    if peaked:
        inputs.query, inputs.key = inputs.query * 3, inputs.key * 3
    tiles = Bf16Tiles(AttentionShape(2, 5, 509, 613, 40, 2), heads, rows)
    promised = tiles.peak(torch.get_num_threads(), training=training)
    # Rows that are computed again, and what oneDNN packs, are counted at their most.
    assert 0.8 * promised <= measured_peak(inputs, by(heads, rows), training=training) <= promised


@given(
    queries=st.integers(1, 5000),
    keys=st.integers(512, 5000),
    heads=st.integers(1, 20),
    budget=st.integers(0, 2**26),
    training=st.booleans(),
)
def test_a_plan_fits_its_budget(queries: int, keys: int, heads: int, budget: int, training: bool) -> None:
    shape = AttentionShape(2, heads, queries, keys, 40, 2)
    plan = bf16_plan(shape, budget, policy="exact", training=training, threads=2)
    if plan is not None:
        assert plan.peak_bytes == Bf16Tiles(shape, plan.heads, plan.rows).peak(2, training=training) <= budget
        assert 1 <= plan.heads <= heads
        assert 1 <= plan.rows <= queries
    else:
        assert Bf16Tiles(shape, 1, min(64, queries)).peak(2, training=training) > budget


@pytest.mark.parametrize(
    "more", [{"causal": True}, {"dropout": True}, {"mask": MaskShape(1, 1, 61, 613)}, {"keys": 77}], ids=str
)
def test_what_it_cannot_do_or_is_slower_at_is_left_to_others(more: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"batch": 2, "heads": 3, "queries": 61, "keys": 613, "head_dim": 8, "itemsize": 2}
    assert bf16_plan(AttentionShape(**sizes), 2**30, policy="exact", training=False, threads=2) is not None
    assert bf16_plan(AttentionShape(**(sizes | more)), 2**30, policy="exact", training=False, threads=2) is None


def test_turns_suit_the_cache() -> None:
    for sizes in ((8, 4096, 4096, 40), (8, 1024, 1024, 80), (10, 4096, 4096, 64), (8, 16384, 16384, 40)):
        tiles = bf16_tiles(AttentionShape(1, *sizes, 2), 2**40, 2, training=False)
        assert tiles is not None
        assert 2**20 <= tiles.forward["scores"] <= 2**21


def test_nothing_is_kept_unless_asked_for() -> None:
    inputs = layer_inputs(BF16)
    call = Call(0.0, False, 0.3, False, 2, 23, None)
    _, *kept = bf16_forward(inputs.query, inputs.key, inputs.value, call, keep=False)
    assert [tensor.numel() for tensor in kept] == [0, 0]


def test_it_compiles_into_one_node() -> None:
    inputs = layer_inputs(BF16)
    compiled = torch.compile(by(2, 23), fullgraph=True, backend="aot_eager")
    assert torch.equal(inputs.run(compiled), inputs.run(by(2, 23)))


# opcheck reads `.grad` of its own copies, which are no leaves where strides are a layer's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("key_heads", [None, 3])
@pytest.mark.parametrize("keep", [False, True])
def test_the_operators_are_registered_as_pytorch_wants_them(keep: bool, key_heads: int | None) -> None:
    inputs = layer_inputs(BF16, heads=6, key_heads=key_heads)
    leaves = inputs.leaves() if keep else inputs
    arguments = (leaves.query, leaves.key, leaves.value, 0.3, 2, 23, keep)
    torch.library.opcheck(torch.ops.slicemod.bf16_attention, arguments)
    if keep:
        kept = torch.ops.slicemod.bf16_attention(inputs.query, inputs.key, inputs.value, *arguments[3:])
        grad = torch.randn_like(kept[0])
        arguments = (grad, inputs.query, inputs.key, inputs.value, *kept, 0.3, 2, 23, [True, False, True])
        torch.library.opcheck(torch.ops.slicemod.bf16_attention_backward, arguments)
