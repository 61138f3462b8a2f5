"""The native kernel's code for AVX2 and, emulated, for AVX-512, AMX and NEON: exact."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from slicemod.kernels.native import operators as module
from slicemod.kernels.native.binding import BFLOAT_MODE, FLOAT_MODE, TILED_MODE, NativeLibrary
from slicemod.kernels.native.build import SOURCES, compiler_found, native_library, native_obstacle
from tests.kernels.features import BLOCK_MASKS, MASKS, block_mask, featured
from tests.kernels.native.dropped import dropout_factors
from tests.kernels.native.on_arm import MISSING, LibraryOnArm
from tests.kernels.native.test_features import assert_dropout_is_as_exact_as_what_it_leaves
from tests.kernels.native.test_operators import assert_large_scores_stay_exact, native
from tests.oracle import assert_as_exact_as_sdpa, layer_inputs
from tests.pairwise import pairwise

pytestmark = [
    pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="its code for x86-64 is compiled and run"),
]

EMULATED = Path(__file__).parent / "emulated_avx512.h"
OPTIONS = {8: (), 16: ("-include", str(EMULATED), "-Wno-psabi")}  # by floats of a vector
MODES = [
    *((lanes, dtype, FLOAT_MODE) for lanes in (4, 8, 16) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    (16, torch.bfloat16, BFLOAT_MODE),
    (16, torch.bfloat16, TILED_MODE),
]
# One mode of each library for x86-64 always, and the tiles; the others share most of their code.
FEW = [*((lanes, torch.float32, FLOAT_MODE) for lanes in (8, 16)), (16, torch.bfloat16, TILED_MODE)]


@pytest.fixture(scope="module")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], NativeLibrary]:
    """The kernel by floats of a vector: for x86-64 with AVX2 alone, for x86-64 with all that there is, and for Arm."""
    compiler, folder = compiler_found(), tmp_path_factory.mktemp("native")
    assert compiler is not None

    @lru_cache
    def compiled(lanes: int) -> NativeLibrary:
        if lanes == 4:
            return LibraryOnArm(folder)
        target = folder / f"{lanes}.so"
        command = [*compiler, "-O1", "-mavx2", "-mfma", "-mf16c", "-std=c++17", "-shared", "-fPIC", *OPTIONS[lanes]]
        subprocess.run([*command, "-o", str(target), str(SOURCES / "attention.cpp")], check=True)
        return NativeLibrary(target)

    return compiled


@pytest.fixture(
    params=[pytest.param(mode, marks=() if mode in FEW else pytest.mark.slow) for mode in MODES],
    ids=lambda mode: "{}-{}-{}".format(*mode),
)
def dtype(
    request: pytest.FixtureRequest, library_of: Callable[[int], NativeLibrary], monkeypatch: pytest.MonkeyPatch
) -> torch.dtype:
    """Each dtype in each mode of each library."""
    lanes: int
    dtype: torch.dtype
    lanes, dtype, mode = request.param
    if lanes == 4 and MISSING:
        pytest.skip(f"Arm's processors are not emulated without {' and '.join(MISSING)}")
    library = library_of(lanes)
    assert library.vector_lanes == lanes
    monkeypatch.setitem(library.modes, dtype, mode)
    monkeypatch.setattr(module, "native_library", lambda: library)
    return dtype


@pytest.mark.parametrize(
    "sizes", [(61, 53, 11), (1, 17, 40), (131, 77, 64), (103, 29, 163), (167, 653, 24), (7, 5, 1)], ids=str
)
def test_it_is_as_exact_as_sdpa(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    queries, keys, width = sizes
    assert_as_exact_as_sdpa(native, layer_inputs(dtype, batch=1, heads=2, queries=queries, keys=keys, width=width))


@pytest.mark.parametrize(("kind", "key_heads"), pairwise(MASKS, [None, 1]), ids=str)
def test_it_is_as_exact_as_sdpa_with_masks_too(dtype: torch.dtype, kind: str, key_heads: int | None) -> None:
    assert_as_exact_as_sdpa(native, featured(dtype, kind, (67, 131), (40, 23), key_heads), ulps=2)


@pytest.mark.parametrize("name", BLOCK_MASKS)
def test_blocks_that_a_mask_hides_are_left_out_and_nothing_else(dtype: torch.dtype, name: str) -> None:
    seen = block_mask(name, 293, 653)
    inputs = layer_inputs(dtype, batch=1, heads=2, queries=293, keys=653, width=24, mask=seen)
    assert_as_exact_as_sdpa(native, inputs)


def test_results_are_rounded_to_the_nearest_number_and_ties_to_even(dtype: torch.dtype) -> None:
    alike, values = torch.zeros(1, 2, 2, 3, dtype=dtype), torch.randn(1, 2, 2, 61).to(dtype)
    mean = values.double().mean(2, keepdim=True).to(dtype)
    assert native(alike, alike, values).equal(mean.expand(1, 2, 2, 61))


def test_the_dropped_weights_do_not_depend_on_the_instructions(dtype: torch.dtype) -> None:
    identity = torch.eye(131).expand(1, 2, 131, 131).to(dtype)
    alike = torch.zeros(1, 2, 131, 3, dtype=dtype)
    output = native(alike, alike, identity, dropout_p=0.3, seed=torch.tensor(12345))
    assert torch.equal(output[0] > 0, dropout_factors(12345, 0.3, 2, 131, 131) > 0)


def test_dropout_is_as_exact_as_what_it_leaves(dtype: torch.dtype) -> None:
    assert_dropout_is_as_exact_as_what_it_leaves(dtype, "gradient, shared by heads", 1, 0.3)


def test_channels_may_lie_apart(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype, batch=1, heads=2, queries=37, keys=61, width=24)
    for name in ("query", "key", "value"):
        tensor = getattr(inputs, name)
        setattr(inputs, name, tensor.transpose(2, 3).contiguous().transpose(2, 3))
        assert getattr(inputs, name).stride(3) > 1
    assert_as_exact_as_sdpa(native, inputs)


@pytest.mark.parametrize("growth", [9, 140])
def test_scores_that_grow_from_key_to_key_rescale_what_was_summed(dtype: torch.dtype, growth: int) -> None:
    inputs = layer_inputs(dtype, batch=1, heads=1, queries=71, keys=613, width=16)
    inputs.query[..., 0] = 6.0
    inputs.key[..., 0] = torch.linspace(-growth, growth, 613).to(dtype)[None, None]
    assert_as_exact_as_sdpa(native, inputs)


def test_large_scores_stay_exact(dtype: torch.dtype) -> None:
    assert_large_scores_stay_exact(dtype)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype, value: float) -> None:
    inputs = layer_inputs(dtype, batch=1, heads=1, queries=37, keys=61, width=24)
    expected = native(inputs.query, inputs.key, inputs.value)
    inputs.query[0, 0, 5, 3] = value
    output = native(inputs.query, inputs.key, inputs.value)
    assert output[0, 0, 5].isnan().all()
    others = torch.arange(37) != 5
    assert output[0, 0, others].equal(expected[0, 0, others])
