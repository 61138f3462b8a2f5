"""The Triton kernels are as exact as SDPA, in Triton's interpreter. `make gpu-check` runs these tests."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.triton.operators import triton_attention
from slicemod.kernels.triton.present import interpreted
from slicemod.reference import reference_attention
from tests.kernels.features import MASKS, SIZES, WIDTHS, inputs_of
from tests.kernels.native.test_binding import KINDS, plain
from tests.kernels.native.test_operators import FAR_APART
from tests.kernels.triton.philox import dropout_factors
from tests.kernels.triton.versions import too_old
from tests.kernels.with_dropout import assert_as_exact_as_what_is_left
from tests.oracle import Inputs, assert_as_exact_as_sdpa, error, layer_inputs, layer_like, results
from tests.pairwise import pairwise
from tests.test_functional import LAYOUTS, SPECIAL, strided
from tests.test_memory_promise import promise_and_peak

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="wants TRITON_INTERPRET=1; make gpu-check sets it"),
    pytest.mark.skipif(too_old() is not None, reason=str(too_old())),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLICING = SliceConfig(kernel="triton")
by_triton = functools.partial(sliced_attention, slicing=SLICING)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_as_exact_as_sdpa(dtype: torch.dtype) -> None:
    assert_as_exact_as_sdpa(by_triton, layer_inputs(dtype, batch=1, queries=71, keys=131, width=40))


@pytest.mark.parametrize(
    ("kind", "dtype", "size", "widths", "key_heads"), pairwise(MASKS, DTYPES, SIZES, WIDTHS, [None, 1]), ids=str
)
def test_any_two_features_together_are_as_exact_as_sdpa(
    kind: str, dtype: torch.dtype, size: str, widths: tuple[int, int], key_heads: int | None
) -> None:
    assert_as_exact_as_sdpa(by_triton, inputs_of(dtype, kind, size, widths, key_heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_an_autoencoder_are_as_wide_as_its_channels(dtype: torch.dtype) -> None:
    assert_as_exact_as_sdpa(by_triton, layer_inputs(dtype, batch=1, heads=1, queries=67, keys=71, width=512))


@pytest.mark.parametrize(
    ("layout", "which", "dtype", "key_heads"),
    pairwise(LAYOUTS, ["query", "key", "value"], [torch.float32, torch.bfloat16], [None, 3]),
    ids=str,
)
def test_strides_do_not_matter(layout: str, which: str, dtype: torch.dtype, key_heads: int | None) -> None:
    inputs = layer_inputs(dtype, heads=6, queries=31, keys=29, width=16, key_heads=key_heads)
    setattr(inputs, which, strided(layout, getattr(inputs, which)))
    assert_as_exact_as_sdpa(by_triton, inputs)


def test_strides_of_masks_and_of_the_incoming_gradient_do_not_matter() -> None:
    mask = torch.randn(29, 31, 3, 2).permute(3, 2, 1, 0).requires_grad_()
    inputs = layer_inputs(queries=31, keys=29, mask=mask)
    assert_as_exact_as_sdpa(by_triton, inputs)
    leaves = inputs.leaves()
    output = leaves.run(by_triton)
    wanted = list(leaves.differentiable().values())
    for grad in (torch.ones(1, 1, 1, 1).expand_as(output), torch.randn(11, 31, 3, 2).permute(3, 2, 1, 0)):
        given = torch.autograd.grad(output, wanted, grad, retain_graph=True)
        expected = torch.autograd.grad(output, wanted, grad.contiguous(), retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))


@pytest.mark.parametrize(("kind", "which"), pairwise(KINDS, ["query", "key", "value", "mask", "grad"]))
def test_a_view_gives_what_its_numbers_give(kind: Any, which: str) -> None:
    inputs, grad = layer_inputs(queries=31, keys=29, mask=torch.randn(2, 3, 31, 29)), torch.randn(2, 3, 31, 11)
    if which == "grad":
        grad = kind((2, 3, 31, 11))
    else:
        setattr(inputs, which, kind(tuple(getattr(inputs, which).shape)))
    assert inputs.mask is not None
    same = Inputs(plain(inputs.query), plain(inputs.key), plain(inputs.value), plain(inputs.mask))
    ours, wanted = results(by_triton, inputs.leaves(), grad), results(by_triton, same.leaves(), plain(grad))
    for name, result in wanted.items():
        assert torch.equal(ours[name], result), name


@pytest.mark.parametrize("sizes", [{"queries": 1}, {"keys": 2}, {"width": 1}, {"heads": 1, "batch": 1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_sizes(dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    inputs = layer_inputs(dtype, **{"queries": 31, "keys": 29, **sizes})
    assert_as_exact_as_sdpa(by_triton, inputs, ulps=4)


# Scores: large ones, shifted ones, and those that grow from key to key


@pytest.mark.parametrize(("dtype", "factor"), [(dtype, factor) for dtype in DTYPES for factor in FAR_APART[dtype]])
@pytest.mark.parametrize("masked", [False, True])
def test_large_scores_stay_exact(dtype: torch.dtype, factor: float, masked: bool) -> None:
    inputs = layer_inputs(dtype, batch=1, heads=1, queries=71, keys=131, width=40)
    inputs.query, inputs.key = inputs.query * factor, inputs.key * factor
    if masked:
        inputs.mask = torch.randn(71, 131).to(dtype)
    grad = layer_like(1, 1, 71, 40, dtype)
    exact = results(reference_attention, inputs.leaves(torch.float64), grad)
    theirs = results(F.scaled_dot_product_attention, inputs.leaves(), grad)
    for name, result in results(by_triton, inputs.leaves(), grad).items():
        assert result.isfinite().all(), name
        ulp = torch.finfo(dtype).eps * float(exact[name].norm())
        if theirs[name].isfinite().all():
            assert error(result, exact[name]) <= 2.5 * error(theirs[name], exact[name]) + ulp / 2, name


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_a_common_offset_of_a_rows_scores_costs_no_accuracy(offset: float) -> None:
    inputs = layer_inputs(torch.float16, batch=1, queries=71, keys=131, width=16)
    inputs.query[..., 0] = 4
    inputs.key[..., 0] = offset
    assert_as_exact_as_sdpa(by_triton, inputs)


def test_scores_that_grow_from_key_to_key_rescale_what_was_summed() -> None:
    inputs = layer_inputs(batch=1, queries=71, keys=211, width=16)
    inputs.query[..., 0] = 6.0
    inputs.key[..., 0] = torch.linspace(-40, 40, 211)
    assert_as_exact_as_sdpa(by_triton, inputs)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
@pytest.mark.parametrize("scale", [2.0**-100, 1e-20, 0.03, 1.0])
def test_the_scale_is_a_factor_of_the_scores(scale: float, kind: str) -> None:
    inputs = inputs_of(torch.float32, kind, "short", (11, 11), None)
    inputs.settings["scale"] = scale
    assert_as_exact_as_sdpa(by_triton, inputs)


@pytest.mark.parametrize("scale", [1e-50, 0.0, -0.5, 1e39])
def test_a_scale_that_is_not_ordinary_is_left_to_others(scale: float) -> None:
    inputs = layer_inputs(queries=31, keys=29)
    with pytest.raises(ValueError, match="it does not compute a scale that is not positive"):
        inputs.run(by_triton, scale=scale)
    theirs = inputs.run(F.scaled_dot_product_attention, scale=scale)
    torch.testing.assert_close(inputs.run(sliced_attention, scale=scale), theirs, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize(
    ("where", "kind", "special"),
    pairwise(["query", "key", "value"], ["none", "bool", "additive"], SPECIAL),
)
def test_nan_and_inf_go_where_sdpa_sends_them(where: str, kind: str, special: str) -> None:
    inputs = layer_inputs(queries=31, keys=29)
    if kind != "none":
        inputs.mask = torch.rand(31, 29) > 0.3 if kind == "bool" else torch.randn(31, 29)
    getattr(inputs, where)[1, 2, 7, 5] = SPECIAL[special]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = inputs.run(F.scaled_dot_product_attention)
    torch.testing.assert_close(inputs.run(by_triton), theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


# Dropout


@pytest.mark.parametrize(
    ("kind", "dtype", "key_heads", "dropout_p"),
    pairwise(["none", "bool with dead rows", "gradient, shared by heads", "causal"], DTYPES, [None, 1], [0.1, 0.5]),
    ids=str,
)
def test_dropout_is_as_exact_as_what_it_leaves(
    kind: str, dtype: torch.dtype, key_heads: int | None, dropout_p: float
) -> None:
    """What is dropped is known by numpy."""
    inputs = inputs_of(dtype, kind, "long", (40, 40), key_heads)
    seed = torch.tensor(2**62 + 12345)
    factors = dropout_factors(int(seed), dropout_p, 4, 71, 131)
    causal = kind == "causal"

    def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
        output: Tensor = triton_attention(query, key, value, mask, seed, dropout_p, causal, 40**-0.5, True)[0]
        return output

    assert_as_exact_as_what_is_left(ours, inputs, factors, dropout_p)


def test_all_weights_can_be_dropped() -> None:
    assert not layer_inputs(queries=31, keys=29).run(by_triton, dropout_p=1.0).any()


def test_each_call_draws_anew_and_a_checkpoint_draws_again_what_it_drew() -> None:
    inputs = layer_inputs(queries=31, keys=29).leaves()
    leaves = [inputs.query, inputs.key, inputs.value]
    torch.manual_seed(7)
    first, second = (inputs.run(by_triton, dropout_p=0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    again = checkpoint(by_triton, *leaves, dropout_p=0.3, use_reentrant=False)
    assert torch.equal(again, first)
    for pair in zip(torch.autograd.grad(again.sum(), leaves), torch.autograd.grad(first.sum(), leaves), strict=True):
        assert torch.equal(*pair)


# What is asked for, and what it takes


@pytest.mark.parametrize("kind", ["none", "gradient, shared by heads"])
@pytest.mark.parametrize("name", ["query", "key", "value", "mask"])
def test_gradients_that_nobody_asked_for_are_left_out(name: str, kind: str) -> None:
    inputs = inputs_of(torch.float32, kind, "short", (11, 11), None)
    if getattr(inputs, name) is None:
        return
    every = inputs.leaves()
    if inputs.mask is not None:
        inputs.mask = inputs.mask.detach()
    leaf = getattr(inputs, name).detach().requires_grad_()
    setattr(inputs, name, leaf)
    (grad,) = torch.autograd.grad(inputs.run(by_triton).sum(), leaf)
    (wanted,) = torch.autograd.grad(every.run(by_triton).sum(), getattr(every, name))
    assert torch.equal(grad, wanted)


@pytest.fixture
def nothing_collected() -> Iterator[None]:
    """The interpreter leaves tensors of earlier calls to the garbage collector, whose time is not the measured one."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("nothing_collected")
@pytest.mark.parametrize(
    ("kind", "dtype", "key_heads", "training", "dropout_p"),
    pairwise(["none", "bool", "gradient, shared by heads", "causal"], DTYPES, [None, 1], [False, True], [0.0, 0.3]),
    ids=str,
)
def test_it_takes_what_the_plan_says_to_the_byte(
    kind: str, dtype: torch.dtype, key_heads: int | None, training: bool, dropout_p: float
) -> None:
    inputs = inputs_of(dtype, kind, "long", (11, 23), key_heads)
    inputs.key = strided("head dim outermost", inputs.key)
    promised, peak = promise_and_peak(inputs, SLICING, training=training, dropout_p=dropout_p)
    assert peak == promised
    assert promised == (8 * 2 * 2 * 71 if training else 0) + (8 if dropout_p else 0)


def test_the_same_inputs_give_the_same_bits() -> None:
    inputs, grad = inputs_of(torch.float16, "gradient, shared by heads", "long", (40, 40), 1), torch.randn(2, 2, 71, 40)
    one, other = (results(by_triton, inputs.leaves(), grad) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_one_token_context_is_left_to_others_where_gradients_are_needed() -> None:
    inputs = layer_inputs(queries=31, keys=1)
    output = inputs.run(by_triton)
    assert torch.equal(output, inputs.value.expand_as(output))
    with pytest.raises(ValueError, match="exactly zero where there is one key"):
        inputs.leaves().run(by_triton)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_never_takes_it_on_a_cpu(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype)
    plan = planned_attention(inputs.query, inputs.key, inputs.value, dropout_p=0.1)[1]
    assert plan is not None
    assert plan.kernel != "triton"


# PyTorch's machinery


def test_second_derivatives_are_those_of_the_reference() -> None:
    inputs = layer_inputs(queries=7, keys=5, width=3).leaves()
    exact = inputs.leaves(torch.float64)
    both = []
    for each, attention in ((inputs, by_triton), (exact, reference_attention)):
        (grad,) = torch.autograd.grad(each.run(attention).square().sum(), each.query, create_graph=True)
        both.append(torch.autograd.grad(grad.square().sum(), [each.query, each.key]))
    for ours, wanted in zip(*both, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-3, atol=1e-4)


def test_it_compiles_into_one_node() -> None:
    inputs = layer_inputs(queries=31, keys=29).leaves()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "slicemod" in str(node.target)])
        return graph.forward

    compiled = torch.compile(by_triton, fullgraph=True, backend=backend)
    output = inputs.run(compiled)
    assert graphs == [["slicemod.triton_attention.default"]]
    assert torch.equal(output, inputs.run(by_triton))


def test_a_compiled_step_is_an_eager_one() -> None:
    inputs = layer_inputs(queries=31, keys=29, mask=torch.randn(3, 31, 29).requires_grad_())
    grad = torch.randn(2, 3, 31, 11)
    compiled = torch.compile(by_triton, fullgraph=True, backend="aot_eager")
    ours, eager = results(compiled, inputs.leaves(), grad), results(by_triton, inputs.leaves(), grad)
    for name, result in eager.items():
        assert torch.equal(ours[name], result), name


def test_export_gives_a_program_that_computes_the_same() -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return by_triton(query, key, value)

    inputs = layer_inputs(queries=31, keys=29)
    given = inputs.query, inputs.key, inputs.value
    program = torch.export.export(Attention(), given)
    assert [str(node.target) for node in program.graph.nodes if "slicemod" in str(node.target)] == [
        "slicemod.triton_attention.default"
    ]
    assert torch.equal(program.module()(*given), by_triton(*given))


# opcheck reads `.grad` of its own copies, which are no leaves where strides are a layer's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_are_registered_as_pytorch_wants_them(masked: bool) -> None:
    mask = torch.randn(1, 3, 7, 5) if masked else None
    seed = torch.tensor(12345) if masked else None
    inputs = layer_inputs(queries=7, keys=5, mask=mask)
    leaves = inputs.leaves()
    settings = (0.3 if masked else 0.0, False, 0.25)
    torch.library.opcheck(
        torch.ops.slicemod.triton_attention, (leaves.query, leaves.key, leaves.value, mask, seed, *settings, True)
    )
    given = inputs.query, inputs.key, inputs.value, mask, seed
    kept = torch.ops.slicemod.triton_attention(*given, *settings, True)
    for needs in ([True, False, True, masked], [False, True, False, False]):
        arguments = (torch.randn_like(kept[0]), *given, *kept, *settings, needs)
        torch.library.opcheck(torch.ops.slicemod.triton_attention_backward, arguments)


def test_under_autocast_it_takes_the_autocast_dtype() -> None:
    inputs = layer_inputs(queries=31, keys=29)
    with torch.autocast("cpu", torch.bfloat16):
        output, plan = planned_attention(inputs.query, inputs.key, inputs.value, slicing=SLICING)
    assert plan is not None
    assert (plan.kernel, output.dtype) == ("triton", torch.bfloat16)
