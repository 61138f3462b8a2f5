"""What the Triton kernels are compiled to for GPUs that are not here: this shows what the interpreter cannot.

`make gpu-check` runs all of these tests, and a plain run only the first of each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod.kernels.triton.present import interpreted
from tests.kernels.triton.versions import too_old
from tests.pairwise import pairwise

if (reason := "Triton interprets here, and compiles nothing" if interpreted() else too_old()) is not None:
    pytest.skip(reason, allow_module_level=True)

from triton.compiler.compiler import make_backend

from tests.kernels.triton.compiled import FEATURES, KIB, SHARED, WIDTHS, Compiled, compiled, launches, target_of

# Kernels that may keep registers in memory: how many instructions do, on which kind of card, and why.
SPILLS = {
    ("forward", torch.float32, "sm_"): (16, "with a mask, ptxas stops at 128 registers where it could take 255"),
    ("mask_gradient", torch.float16, "sm_"): (
        20,
        "so it does for sm_100 with 512 channels, Triton 3.9 for sm_86 with 80",
    ),
}


def checked(cases: list[tuple[Any, ...]]) -> list[Any]:
    """All but the first are left to `make gpu-check`."""
    return [pytest.param(*case, marks=[pytest.mark.gpu_check] if number else []) for number, case in enumerate(cases)]


def assert_sound(card: str, dtype: torch.dtype, made: Compiled) -> None:
    assert made.shared <= SHARED[card] * KIB
    if made.kernel == "row_products":  # it multiplies no matrices
        assert made.wide_loads
        return
    nvidia = card.startswith("sm_")
    allowed, _ = SPILLS.get((made.kernel, dtype, "sm_" if nvidia else "gfx"), (0, ""))
    assert made.spills <= allowed
    assert made.products or dtype == torch.float32
    assert made.wide_loads >= (made.loads / 2 if nvidia else 1)


@pytest.mark.parametrize(("card", "width"), checked([(card, width) for width in WIDTHS for card in SHARED]))
def test_kernels_keep_to_registers_and_shared_memory(card: str, width: int) -> None:
    for made in compiled(card, torch.float16, width, FEATURES[-1]):
        assert_sound(card, torch.float16, made)


@pytest.mark.parametrize(
    ("card", "width", "features", "dtype"),
    checked(pairwise(SHARED, WIDTHS, FEATURES[:-1], [torch.float32, torch.bfloat16])),
    ids=str,
)
def test_so_do_those_of_other_dtypes_and_features(card: str, width: int, features: str, dtype: torch.dtype) -> None:
    for made in compiled(card, dtype, width, features):
        assert_sound(card, dtype, made)


@pytest.mark.parametrize("setting", [None, "0"], ids=str)
@pytest.mark.parametrize("card", ["sm_80", "gfx942"])
def test_a_product_and_a_sum_are_one_instruction_whatever_triton_does_by_default(
    card: str, setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.9 warns that its default will change; None stands for no setting."""
    if setting is None:
        monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    else:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", setting)
    for launch in launches(card, torch.float16, 64, FEATURES[-1]):
        assert make_backend(target_of(card)).parse_options(dict(launch.options)).enable_fp_fusion
