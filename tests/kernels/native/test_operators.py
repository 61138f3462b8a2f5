"""The native kernel is as exact as SDPA in every mode of this processor, and takes the memory that its plan says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.call import AttentionShape, CallSpec
from slicemod.functional import planned_attention
from slicemod.kernels.native.binding import BFLOAT_MODE, FLOAT_MODE, TILED_MODE
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.native.kernel import NativeKernel
from slicemod.kernels.native.operators import native_attention
from slicemod.kernels.retry import SmallerSlicesWarning
from slicemod.reference import reference_attention
from tests.kernels.native.planning import plan_of
from tests.measured_peak import measured_peak
from tests.oracle import Inputs, assert_as_exact_as_sdpa, error, layer_inputs, layer_like, results
from tests.pairwise import pairwise
from tests.slow_cases import slow_if

pytestmark = pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention by the native kernel, of a query `(B, H, N, D)`."""
    mask = mask if mask is None else mask[(None,) * (4 - mask.dim())]
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    keep = torch.is_grad_enabled()
    output: Tensor = native_attention(query, key, value, mask, seed, dropout_p, is_causal, scale, keep)[0]
    return output


def modes_here() -> list[tuple[torch.dtype, int]]:
    """Every dtype with every mode that this processor has for it."""
    library = native_library()
    if library is None:
        return []
    best = library.modes[torch.bfloat16]
    # A processor with AMX has the dot products too.
    names = {FLOAT_MODE: [FLOAT_MODE], BFLOAT_MODE: [FLOAT_MODE, BFLOAT_MODE]}
    bfloat = names.get(best, [FLOAT_MODE, BFLOAT_MODE, TILED_MODE])
    return [(torch.float32, FLOAT_MODE), (torch.float16, FLOAT_MODE), *((torch.bfloat16, mode) for mode in bfloat)]


def is_like_float32(dtype: torch.dtype, mode: int) -> bool:
    """Half precision that is converted while it is packed; all else that is computed is as for float32."""
    return dtype.itemsize == 2 and mode == FLOAT_MODE


@pytest.fixture(
    params=slow_if(lambda dtype_and_mode: is_like_float32(*dtype_and_mode), modes_here()),
    ids=lambda dtype_and_mode: "{}-{}".format(*dtype_and_mode),
)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each dtype in each mode."""
    dtype: torch.dtype
    dtype, mode = request.param
    library = native_library()
    assert library is not None
    monkeypatch.setitem(library.modes, dtype, mode)
    return dtype


THREADS = [1, 2, 5]  # one, and more than there are heads


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "sizes",
    [(61, 53, 11), (1, 17, 40), (131, 77, 64), (2, 613, 80), (521, 1031, 40), (1031, 61, 24), (37, 29, 163), (7, 5, 1)],
    ids=str,
)
def test_it_is_as_exact_as_sdpa(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    queries, keys, width = sizes
    assert_as_exact_as_sdpa(native, layer_inputs(dtype, queries=queries, keys=keys, width=width))


@pytest.mark.parametrize(  # an odd number of blocks, and one that two threads share by rows
    ("threads", "heads", "queries"), pairwise(THREADS, [1, 3], [293, 1021]), indirect=["threads"]
)
def test_threads_may_share_heads(dtype: torch.dtype, heads: int, queries: int, threads: int) -> None:
    inputs = layer_inputs(dtype, batch=1, heads=heads, queries=queries, keys=1531, width=19)
    assert_as_exact_as_sdpa(native, inputs)


@pytest.mark.parametrize("threads", [67], indirect=True)
def test_more_threads_than_it_has_ranges_of_heads_for_compute_all_heads(dtype: torch.dtype, threads: int) -> None:
    assert_as_exact_as_sdpa(native, layer_inputs(dtype, batch=1, heads=threads + 4, queries=5, keys=7, width=3))


def test_heads_of_an_autoencoder_are_as_wide_as_its_channels(dtype: torch.dtype) -> None:
    assert_as_exact_as_sdpa(native, layer_inputs(dtype, batch=1, heads=1, queries=67, keys=307, width=512))


@pytest.mark.parametrize("spread", [0.3, 4.0, 16.0, 400.0])
def test_it_is_exact_however_far_scores_spread(dtype: torch.dtype, spread: float) -> None:
    inputs = layer_inputs(dtype, keys=1103)
    inputs.query, inputs.key = inputs.query * math.sqrt(spread), inputs.key * math.sqrt(spread)
    assert_as_exact_as_sdpa(native, inputs, ulps=4)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_a_common_offset_of_a_rows_scores_costs_no_accuracy(dtype: torch.dtype, offset: float) -> None:
    inputs = layer_inputs(dtype, keys=1103, width=16)
    inputs.query[..., 0] = 4
    inputs.key[..., 0] = offset
    assert_as_exact_as_sdpa(native, inputs)


@pytest.mark.parametrize("growth", [9, 140])  # the weights of one block of keys, or of a few keys, outgrow all before
@pytest.mark.parametrize("width", [16, 83])
def test_scores_that_grow_from_key_to_key_rescale_what_was_summed(dtype: torch.dtype, width: int, growth: int) -> None:
    inputs = layer_inputs(dtype, batch=1, queries=71, keys=1103, width=width)
    inputs.query[..., 0] = 1.5 * math.sqrt(width)
    inputs.key[..., 0] = torch.linspace(-growth, growth, 1103).to(dtype)[None, None]
    assert_as_exact_as_sdpa(native, inputs)


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_the_scale_is_a_factor_of_the_scores(dtype: torch.dtype, scale: float) -> None:
    assert_as_exact_as_sdpa(native, layer_inputs(dtype, scale=scale))


FAR_APART = {  # factors of query and key, whose products float32 just holds with the largest
    torch.float32: [30.0, 3e4, 1e9, 1e18],
    torch.bfloat16: [30.0, 1e3, 3e4, 1e18],
    torch.float16: [30.0, 1e3, 1e4],
}


def assert_large_scores_stay_exact(dtype: torch.dtype) -> None:
    """However large scores are, errors are at most twice those of SDPA, whose gradients may be lost to NaN."""
    for factor in FAR_APART[dtype]:
        inputs = layer_inputs(dtype, batch=1, queries=131, keys=613, width=40)
        inputs.query, inputs.key = inputs.query * factor, inputs.key * factor
        grad = layer_like(1, 3, 131, 40, dtype)
        exact = results(reference_attention, inputs.leaves(torch.float64), grad)
        theirs = results(F.scaled_dot_product_attention, inputs.leaves(), grad)
        for name, result in results(native, inputs.leaves(), grad).items():
            assert result.isfinite().all(), (factor, name)
            ulp = torch.finfo(dtype).eps * float(exact[name].norm())
            lost = not theirs[name].isfinite().all()
            if name in ("output", "value") or not lost:
                allowed = 2 * ulp if lost else 2.5 * error(theirs[name], exact[name]) + ulp / 2
                assert error(result, exact[name]) <= allowed, (factor, name)


def test_large_scores_stay_exact(dtype: torch.dtype) -> None:
    assert_large_scores_stay_exact(dtype)


def test_large_scores_may_grow_from_key_to_key(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype, batch=1, queries=71, keys=1103, width=16)
    step = torch.arange(1103)
    inputs.query[..., 0] = 1e4 if dtype == torch.float16 else 1e12
    inputs.key[..., 0] = (1 + step % 128 / 128) * 2.0 ** (step // 128 + 7)  # each apart from the others in bfloat16 too
    output = inputs.run(native)
    assert torch.equal(output, inputs.value[:, :, -1:].expand(output.shape))


SCALES_OF_OTHERS = [1e-50, 1e-45, 1e-39, 0.0, -0.5, 1e39, math.inf, math.nan]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scale", SCALES_OF_OTHERS)
def test_a_scale_that_float32_does_not_hold_as_a_positive_number_is_left_to_others(
    scale: float, training: bool
) -> None:
    inputs = layer_inputs(queries=521, keys=521, width=40)
    inputs = inputs.leaves() if training else inputs
    output, plan = planned_attention(inputs.query, inputs.key, inputs.value, scale=scale)
    assert plan is not None
    assert plan.kernel != "native"
    theirs = inputs.run(F.scaled_dot_product_attention, scale=scale)
    torch.testing.assert_close(output, theirs, rtol=0, atol=1e-6, equal_nan=True)
    if training:
        grads = (torch.autograd.grad(each.sum(), [inputs.query, inputs.key, inputs.value]) for each in (output, theirs))
        for ours, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("scale", [2.0**-100, 1e-20])
def test_the_least_scales_weigh_all_keys_alike(dtype: torch.dtype, scale: float) -> None:
    inputs = layer_inputs(dtype, scale=scale)
    assert_as_exact_as_sdpa(native, inputs)


@st.composite
def calls(draw: st.DrawFn) -> Inputs:
    small = st.integers(1, 7)
    torch.manual_seed(draw(st.integers(0, 99)))
    inputs = layer_inputs(
        draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(1, 3)),
        heads=draw(small),
        queries=draw(st.integers(1, 71)),
        keys=draw(st.integers(1, 300)),
        width=draw(st.integers(1, 70)),
    )
    if draw(st.booleans()):  # no column next to another
        inputs.key = inputs.key.transpose(2, 3).contiguous().transpose(2, 3)
    if draw(st.booleans()):
        inputs.query = inputs.query.repeat_interleave(2, 3)[..., ::2]
    if draw(st.booleans()):  # the same keys for every head
        inputs.value = inputs.value[:, :1].expand(inputs.value.shape)
    return inputs


@given(inputs=calls())
def test_any_call_of_any_strides_is_as_exact_as_sdpa(inputs: Inputs) -> None:
    assert_as_exact_as_sdpa(native, inputs, ulps=4)


def test_values_may_be_narrower_than_keys(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype, width=43)
    inputs.value = inputs.value[..., :7]
    assert_as_exact_as_sdpa(native, inputs)


def test_a_gradient_that_is_the_same_everywhere_has_no_strides(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype).leaves()
    wanted = [inputs.query, inputs.key, inputs.value]
    output = inputs.run(native)
    ones = torch.ones_like(output)
    expanded = torch.autograd.grad(output.sum(), wanted, retain_graph=True)
    assert all(map(torch.equal, expanded, torch.autograd.grad(output, wanted, ones)))


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_and_inf_go_where_sdpa_sends_them(dtype: torch.dtype, which: str, special: float) -> None:
    inputs = layer_inputs(dtype, batch=1)
    getattr(inputs, which)[0, 1, 5, 3] = special
    with sdpa_kernel(SDPBackend.MATH):
        ours, theirs = inputs.run(native), inputs.run(F.scaled_dot_product_attention)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


def test_a_key_that_is_infinitely_far_gets_no_gradient(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype, batch=1)
    inputs.query[..., 3] = 1
    inputs.key[0, 1, 5, 3] = -math.inf
    ones = torch.ones_like(inputs.run(native))
    with sdpa_kernel(SDPBackend.MATH):
        ours, theirs = (results(each, inputs.leaves(), ones) for each in (native, F.scaled_dot_product_attention))
    for name in ("key", "value"):
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()), name
        assert not ours[name][0, 1, 5].any(), name


@pytest.mark.parametrize("keys", [3, 67, 301])  # of one chunk of scores, of more than one, of a block and more
def test_keys_that_are_infinitely_far_may_come_first(dtype: torch.dtype, keys: int) -> None:
    inputs = layer_inputs(dtype, batch=1, keys=409)
    inputs.query[..., 3] = 1
    near = Inputs(inputs.query, inputs.key[:, :, keys:], inputs.value[:, :, keys:])
    inputs.key[:, :, :keys, 3] = -math.inf
    torch.testing.assert_close(inputs.run(native), near.run(native), rtol=0, atol=max(torch.finfo(dtype).eps, 2e-6))


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_gradients_that_nobody_asked_for_are_left_out(dtype: torch.dtype, which: str) -> None:
    inputs = layer_inputs(dtype)
    tensor = getattr(inputs, which).requires_grad_()
    output = inputs.run(native)
    (alone,) = torch.autograd.grad(output, [tensor], torch.ones_like(output))
    assert torch.equal(alone, results(native, inputs.leaves(), torch.ones_like(output))[which])


def test_gradients_can_be_differentiated_again(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype).leaves()
    output = inputs.run(native)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), [inputs.query], create_graph=True)
    (second,) = torch.autograd.grad(gradient.float().square().sum(), [inputs.key])
    assert second.isfinite().all()
    assert float(second.abs().max()) > 0


def test_the_same_call_gives_the_same_bits(dtype: torch.dtype, threads: int) -> None:
    inputs = layer_inputs(dtype, queries=1031, keys=1531, width=19)
    grad = torch.ones(2, 3, 1031, 19, dtype=dtype)
    once, twice = (results(native, inputs.leaves(), grad) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize(
    ("threads", "sizes", "training"),
    pairwise(THREADS, [(2, 5, 509, 613, 40), (1, 1, 1531, 1531, 64), (1, 3, 257, 521, 160)], [False, True]),
    ids=str,
    indirect=["threads"],
)
def test_the_peak_is_what_the_plan_says(
    dtype: torch.dtype, sizes: tuple[int, ...], training: bool, threads: int
) -> None:
    batch, heads, queries, keys, width = sizes
    shape = AttentionShape(batch, heads, queries, keys, width, dtype.itemsize)
    plan = plan_of(shape, dtype, 2**40, training=training, threads=threads)
    assert plan is not None
    inputs = layer_inputs(dtype, batch=batch, heads=heads, queries=queries, keys=keys, width=width)
    assert 0.99 * plan.peak_bytes <= measured_peak(inputs, native, training=training) <= plan.peak_bytes


@given(
    queries=st.integers(1, 9000),
    keys=st.integers(1, 9000),
    heads=st.integers(1, 20),
    threads=st.integers(1, 64),
    budget=st.integers(0, 2**26),
    training=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_a_plan_fits_its_budget(
    queries: int, keys: int, heads: int, threads: int, budget: int, training: bool, dtype: torch.dtype
) -> None:
    shape = AttentionShape(2, heads, queries, keys, 40, dtype.itemsize)
    plan = plan_of(shape, dtype, budget, training=training, threads=threads)
    whole = plan_of(shape, dtype, 2**60, training=training, threads=threads)
    if plan is not None:
        assert plan == whole
        assert plan.peak_bytes <= budget
        assert plan.steps == -(-queries // plan.rows)
    elif whole is not None:
        assert whole.peak_bytes > budget


def test_the_workspace_does_not_grow_with_the_tokens(dtype: torch.dtype) -> None:
    def peak(tokens: int) -> int:
        shape = AttentionShape(1, 8, tokens, tokens, 40, dtype.itemsize)
        plan = plan_of(shape, dtype, 2**40, training=False, threads=2)
        assert plan is not None
        return plan.peak_bytes

    assert peak(2048) == peak(4096) == peak(65536)


@pytest.mark.usefixtures("nothing_said")
def test_out_of_memory_it_goes_on_with_fewer_threads_and_the_same_result(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    inputs = layer_inputs(dtype, queries=1031, keys=509)
    grad = torch.ones(2, 3, 1031, 11, dtype=dtype)
    wanted = results(native, inputs.leaves(), grad)
    asked: list[int] = []

    def fails_at_first(size: int) -> Tensor:
        asked.append(size)
        if len(asked) in (1, 3):  # forward and backward with all threads
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes")
        return torch.empty(size, dtype=torch.uint8)

    library = native_library()
    monkeypatch.setattr(library, "workspace", fails_at_first)
    with pytest.warns(SmallerSlicesWarning, match="blocks of 4 threads and goes on with those of 2"):
        found = results(native, inputs.leaves(), grad)
    assert len(asked) == 4
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])
    monkeypatch.setattr(library, "workspace", lambda size: torch.empty(2**62, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        inputs.run(native)


def test_one_key_in_training_is_left_to_others() -> None:
    for keys in (1, 2):
        shape = AttentionShape(2, 3, 521, keys, 40, 2)
        call = CallSpec(shape, torch.bfloat16, torch.device("cpu"), training=True)
        assert (NativeKernel().obstacle(call) is not None) == (keys == 1)


def test_values_without_channels_are_left_to_others() -> None:
    shape = AttentionShape(2, 3, 521, 613, 40, 2, value_dim=0)
    assert plan_of(shape, torch.bfloat16, 2**30, training=False, threads=2) is None


@pytest.mark.parametrize(
    "more",
    [
        {"scale": -0.5},
        {"dtype": torch.float64},
    ],
    ids=lambda more: next(iter(more)),
)
def test_its_plan_is_refused_for_what_it_does_not_compute(more: dict[str, Any]) -> None:
    inputs = layer_inputs(queries=521, keys=521, width=40)
    plan = planned_attention(inputs.query, inputs.key, inputs.value)[1]
    assert plan is not None
    assert plan.kernel == "native"
    query, key, value = (each.to(more.get("dtype")) for each in (inputs.query, inputs.key, inputs.value))
    with pytest.raises(ValueError, match="plan: expected one made for this call"):
        planned_attention(query, key, value, plan=plan, **{name: more[name] for name in more if name != "dtype"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_takes_it_and_says_so(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype, queries=521, keys=521, width=40)
    for slicing, kernel in (
        (None, "native"),
        ({"kernel": "math"}, "math"),
        ({"kernel": "fused"}, "fused"),
        ({"steps": 2}, "math"),
        ({"budget": "64KiB", "policy": "exact"}, "math"),
    ):
        plan = planned_attention(inputs.query, inputs.key, inputs.value, slicing=slicing)[1]
        assert plan is not None
        assert plan.kernel == kernel, slicing
        assert plan.kernel in str(plan) or kernel == "math"


def test_transforms_of_functions_are_left_to_others() -> None:
    inputs = layer_inputs(queries=521, keys=521, width=40)

    def loss(query: Tensor) -> Tensor:
        return planned_attention(query, inputs.key, inputs.value)[0].square().sum()

    query = inputs.query.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(query), [query])
    torch.testing.assert_close(torch.func.grad(loss)(inputs.query), wanted)


def test_double_precision_is_left_to_others() -> None:
    inputs = layer_inputs(torch.float64, queries=521, keys=521, width=40)
    plan = planned_attention(inputs.query, inputs.key, inputs.value)[1]
    assert plan is not None
    assert plan.kernel == "fused"


def test_under_autocast_it_takes_the_autocast_dtype() -> None:
    inputs = layer_inputs(queries=521, keys=521, width=40)
    with torch.autocast("cpu", torch.bfloat16):
        output, plan = planned_attention(inputs.query, inputs.key, inputs.value)
    assert plan is not None
    assert (plan.kernel, output.dtype) == ("native", torch.bfloat16)


def test_nothing_is_kept_unless_asked_for() -> None:
    inputs = layer_inputs()
    given = inputs.query, inputs.key, inputs.value, None, None, 0.0, False, 0.3
    assert native_attention(*given, False)[1].numel() == 0


def test_it_compiles_into_one_node() -> None:
    inputs = layer_inputs()
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    assert torch.equal(inputs.run(compiled), inputs.run(native))


# opcheck reads `.grad` of its own copies, which are no leaves where strides are a layer's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_operators_are_registered_as_pytorch_wants_them(keep: bool, masked: bool) -> None:
    mask, seed = (torch.randn(1, 3, 61, 53), torch.tensor(12345)) if masked else (None, None)
    inputs = layer_inputs(mask=mask)
    leaves = inputs.leaves() if keep else inputs
    settings = (0.3 if masked else 0.0, False, 0.25)
    arguments = (leaves.query, leaves.key, leaves.value, mask, seed, *settings, keep)
    torch.library.opcheck(torch.ops.slicemod.native_attention, arguments)
    if keep:
        given = inputs.query, inputs.key, inputs.value, mask, seed
        kept = torch.ops.slicemod.native_attention(*given, *settings, True)
        for needs in ([True, False, True, masked], [False, True, False, False]):
            arguments = (torch.randn_like(kept[0]), *given, *kept, *settings, needs)
            torch.library.opcheck(torch.ops.slicemod.native_attention_backward, arguments)


@pytest.mark.parametrize(
    ("queries", "keys", "values"),
    [((1, 2, 0, 8), (1, 2, 3, 8), (1, 2, 3, 8)), ((1, 3, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8))],
    ids=["no queries", "heads that do not divide"],
)
def test_the_operator_refuses_what_the_kernel_would_read_beyond(
    queries: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"(query, key, value: expected .*, no size 0.*|key: expected .*); got"):
        native(torch.zeros(queries), torch.zeros(keys), torch.zeros(values))
