"""Which kernels a processor has for a dtype, and that the plan takes the fastest one that is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod import cpu_kernels as module
from slicemod import sliced
from slicemod.cpu_kernels import CpuKernels, cpu_kernels, float32_flash_plan
from slicemod.shapes import AttentionShape
from slicemod.sliced import planned_attention, sliced_attention
from tests.oracle import assert_as_exact_as_sdpa, layer_inputs

CPU = torch.device("cpu")


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the native kernel, which has not seen what was planned on this one."""
    monkeypatch.setattr(module, "native_library", lambda: None)
    monkeypatch.setattr(sliced, "_known_calls", {})


def test_a_half_precision_without_instructions_is_computed_in_float32(
    no_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, dtype in (("_is_mkldnn_bf16_supported", torch.bfloat16), ("_is_mkldnn_fp16_supported", torch.float16)):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)
        assert cpu_kernels(dtype, CPU) == CpuKernels(converts=dtype)
        inputs = layer_inputs(dtype, heads=6)
        trained = planned_attention(inputs.query.requires_grad_(), inputs.key, inputs.value)[1]
        assert trained is not None
        assert (trained.kernel, trained.upcast) == ("fused", True)
        assert_as_exact_as_sdpa(sliced_attention, inputs)


def test_bfloat16_is_converted_for_training_alone() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 40, 2)
    settings: dict[str, Any] = {"policy": "exact", "threads": 2}
    assert float32_flash_plan(shape, torch.bfloat16, 2**30, training=False, **settings) is None
    assert float32_flash_plan(shape, torch.bfloat16, 2**30, training=True, **settings) is not None
    assert float32_flash_plan(shape, torch.float16, 2**30, training=False, **settings) is not None


def test_without_the_native_kernel_pytorch_multiplies_bfloat16(
    no_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert cpu_kernels(torch.bfloat16, CPU) == CpuKernels(products="widened")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert cpu_kernels(torch.bfloat16, CPU) == CpuKernels(products="bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu_kernels(torch.bfloat16, CPU) == CpuKernels(products="tiles")
    for limit, products in (("AVX512_CORE_BF16", "bfloat16"), ("avx512_core", "widened"), ("DEFAULT", "tiles")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert cpu_kernels(torch.bfloat16, CPU).products == products
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    inputs = layer_inputs(torch.bfloat16, queries=521, keys=521, width=40)
    plan = planned_attention(inputs.query, inputs.key, inputs.value)[1]
    assert plan is not None
    assert (plan.kernel, plan.upcast) == ("fused", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_precision_needs_nothing_else(no_native: None, dtype: torch.dtype) -> None:
    assert cpu_kernels(dtype, CPU) == CpuKernels()


def test_other_devices_have_none_of_them() -> None:
    assert cpu_kernels(torch.bfloat16, torch.device("cuda")) == CpuKernels()


def test_double_precision_has_no_native_kernel() -> None:
    assert cpu_kernels(torch.float64, CPU).native is None
