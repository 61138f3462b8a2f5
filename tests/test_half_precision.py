"""How a CPU multiplies half precision, by its instructions and by what the user has oneDNN stop at."""

from __future__ import annotations

import pytest
import torch

from slicemod import half_precision as module
from slicemod.half_precision import cpu_products


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What a processor has: nothing at first."""
    has = dict.fromkeys(("multiplies_bfloat16", "multiplies_float16", "has_tiles", "has_bfloat16_vectors"), False)
    for name in has:
        monkeypatch.setattr(module, name, lambda name=name: has[name])
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    return has


def test_a_processor_without_instructions_multiplies_no_half_precision(processor: dict[str, bool]) -> None:
    assert cpu_products(torch.bfloat16) is None
    assert cpu_products(torch.float16) is None


def test_float16_has_instructions_of_its_own(processor: dict[str, bool]) -> None:
    processor["multiplies_float16"] = True
    assert cpu_products(torch.float16) == "float16"
    assert cpu_products(torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_precision_needs_none(dtype: torch.dtype, processor: dict[str, bool]) -> None:
    processor |= {"multiplies_bfloat16": True, "multiplies_float16": True, "has_tiles": True}
    assert cpu_products(dtype) is None


def test_bfloat16_is_multiplied_by_the_best_there_is(processor: dict[str, bool]) -> None:
    processor["multiplies_bfloat16"] = True
    assert cpu_products(torch.bfloat16) == "widened"
    processor["has_bfloat16_vectors"] = True
    assert cpu_products(torch.bfloat16) == "bfloat16"
    processor["has_tiles"] = True
    assert cpu_products(torch.bfloat16) == "tiles"


@pytest.mark.parametrize(
    ("limit", "products"),
    [("AVX512_CORE_BF16", "bfloat16"), ("avx512_core", "widened"), ("DEFAULT", "tiles"), ("AVX512_CORE_AMX", "tiles")],
)
def test_the_limit_that_the_user_sets_is_kept(
    limit: str, products: str, processor: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor |= {"multiplies_bfloat16": True, "has_bfloat16_vectors": True, "has_tiles": True}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_products(torch.bfloat16) == products
