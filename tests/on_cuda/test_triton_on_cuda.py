"""The Triton kernels on a GPU: what the interpreter shows of them on a CPU, and what only a GPU can show."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.kernels.triton.operators import triton_attention
from slicemod.kernels.triton.present import triton_obstacle
from tests.kernels.features import MASKS, WIDTHS, inputs_of
from tests.kernels.triton.philox import dropout_factors
from tests.kernels.with_dropout import with_dropout
from tests.oracle import assert_as_exact_as_sdpa, error, layer_inputs, layer_like, results
from tests.pairwise import pairwise
from tests.test_memory_promise import promise_and_peak

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLICING = SliceConfig(kernel="triton")
by_triton = functools.partial(sliced_attention, slicing=SLICING)


@pytest.fixture(autouse=True)
def _on_cuda() -> Iterator[None]:
    if (obstacle := triton_obstacle(torch.device("cuda"))) is not None:
        pytest.skip(obstacle)
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize(("kind", "dtype", "widths", "key_heads"), pairwise(MASKS, DTYPES, WIDTHS, [None, 2]), ids=str)
def test_any_two_features_together_are_as_exact_as_sdpa(
    kind: str, dtype: torch.dtype, widths: tuple[int, int], key_heads: int | None
) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert_as_exact_as_sdpa(by_triton, inputs_of(dtype, kind, "long", widths, key_heads))


@pytest.mark.parametrize("width", [40, 64, 80, 128, 160, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_stable_diffusion_are_as_exact_as_sdpa(dtype: torch.dtype, width: int) -> None:
    inputs = layer_inputs(dtype, batch=1, heads=2, queries=1031, keys=997, width=width)
    assert_as_exact_as_sdpa(by_triton, inputs)
    promised, peak = promise_and_peak(inputs, SLICING, training=True)
    assert peak == promised == 8 * 2 * 1031


@pytest.mark.parametrize("factor", [30.0, 1e3, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_stay_finite_and_exact(dtype: torch.dtype, factor: float) -> None:
    inputs = layer_inputs(dtype, batch=1, queries=131, keys=613, width=40)
    inputs.query, inputs.key = inputs.query * factor, inputs.key * factor
    for name, result in results(by_triton, inputs.leaves(), layer_like(1, 3, 131, 40, dtype)).items():
        assert result.isfinite().all(), name
    exact = inputs.leaves(torch.float64)
    wanted = exact.run(F.scaled_dot_product_attention)
    theirs = error(inputs.run(F.scaled_dot_product_attention), wanted)
    ulp = torch.finfo(dtype).eps * float(wanted.detach().norm())
    assert error(inputs.run(by_triton), wanted) <= 2 * theirs + ulp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_that_are_dropped_are_those_that_numpy_says(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype, "none", "long", (40, 40), 2)
    seed, dropout_p = torch.tensor(2**62 + 12345), 0.3
    factors = dropout_factors(int(seed), dropout_p, 8, 71, 131).cuda()

    def exactly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: object) -> Tensor:
        return with_dropout(factors, query, key, value, mask, False)

    def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: object) -> Tensor:
        output: Tensor = triton_attention(query, key, value, mask, seed, dropout_p, False, 40**-0.5, True)[0]
        return output

    grad = layer_like(2, 4, 71, 40, dtype)
    exact, found = results(exactly, inputs.leaves(torch.float64), grad), results(ours, inputs.leaves(), grad)
    for name, result in found.items():
        assert error(result, exact[name]) <= 16 * torch.finfo(dtype).eps * float(exact[name].norm()), name


def test_a_checkpoint_drops_again_what_it_dropped() -> None:
    inputs = layer_inputs(torch.float16, queries=131, keys=113).leaves()
    leaves = [inputs.query, inputs.key, inputs.value]
    torch.manual_seed(7)
    first = inputs.run(by_triton, dropout_p=0.3)
    torch.manual_seed(7)
    again = checkpoint(by_triton, *leaves, dropout_p=0.3, use_reentrant=False)
    assert torch.equal(first, again)
    for pair in zip(torch.autograd.grad(again.sum(), leaves), torch.autograd.grad(first.sum(), leaves), strict=True):
        assert torch.equal(*pair)


def test_the_same_inputs_give_the_same_bits() -> None:
    inputs = inputs_of(torch.float16, "gradient, shared by heads", "long", (40, 40), 2)
    grad = torch.randn(2, 4, 71, 40)
    one, other = (results(by_triton, inputs.leaves(), grad) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_compiled_step_is_an_eager_one() -> None:
    inputs, grad = layer_inputs(torch.float16, queries=131, keys=113, width=40), torch.randn(2, 3, 131, 40)
    compiled = torch.compile(by_triton, fullgraph=True)
    ours, eager = results(compiled, inputs.leaves(), grad), results(by_triton, inputs.leaves(), grad)
    for name, result in eager.items():
        torch.testing.assert_close(ours[name], result)
