"""Which kernels a device has, and what each layer of a model takes."""

from __future__ import annotations

import pytest
import torch

from slicemod import kernels
from slicemod.call import CallSpec
from slicemod.choose import choose
from slicemod.config import SliceConfig
from slicemod.planning.kernel_choices import choices, kernels_on
from slicemod.planning.model_layers import KNOWN_LAYERS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SD15 = KNOWN_LAYERS["sd15"]


def test_every_kernel_of_the_list_is_there_or_says_why_not() -> None:
    for device in (CPU, CUDA):
        found = list(kernels_on(device))
        assert [kernel.kernel for kernel in found] == [kernel.name for kernel in kernels.KERNELS]
        assert all((kernel.obstacle is None) == bool(kernel.dtypes) for kernel in found)
    on_cuda = {kernel.kernel: kernel for kernel in found}
    assert on_cuda["native"].obstacle == "it runs on CPUs, and the call is on cuda"
    assert "bfloat16 on cuda" in str(on_cuda["fused-float32"].obstacle)
    assert on_cuda["math"].dtypes == (torch.float32, torch.float16, torch.bfloat16)


def test_a_kernel_for_half_precision_alone_is_there_in_half_precision() -> None:
    (kernel,) = [kernel for kernel in kernels_on(CPU) if kernel.kernel == "fused-float32"]
    assert kernel.dtypes == (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plans_are_those_of_the_calls(dtype: torch.dtype) -> None:
    found = list(choices(SD15, 512, CPU, dtype, 2**26))
    assert [choice.training for choice in found] == [False] * len(SD15.layers) + [True] * len(SD15.layers)
    for choice in found:
        assert choice.shape.batch == (1 if choice.training else 2)
        assert choice.shape.upcast == (dtype == torch.bfloat16)
        call = CallSpec.planned(choice.shape, CPU, dtype, training=choice.training)
        assert choice.plan == choose(call, SliceConfig(), 2**26)


def test_the_better_kernels_say_why_they_are_passed_over() -> None:
    found = next(choices(SD15, 512, CUDA, torch.float16, 2**26))
    assert found.plan is not None
    assert found.plan.kernel == "fused"
    assert list(found.passed_over) == ["native", "fused-float32"]


def test_where_none_fits_all_say_why() -> None:
    found = next(choice for choice in choices(SD15, 512, CUDA, torch.float16, 16) if choice.training)
    assert found.plan is None
    assert list(found.passed_over) == [kernel.name for kernel in kernels.KERNELS]
    assert "16 bytes" in found.passed_over["fused"]


def test_a_model_whose_pipeline_does_not_guide_at_once_has_one_item() -> None:
    found = list(choices(SD15._replace(guidance_batch=1), 512, CUDA, torch.float16, 2**26))
    assert {choice.shape.batch for choice in found} == {1}
