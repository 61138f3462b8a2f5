"""PyTorch's attention on Metal: which calls it takes, simulated by tensors without memory that say they are there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod.call import AttentionShape, CallSpec, Layout, MaskShape
from slicemod.functional import planned_attention
from slicemod.kernels.fused import metal_attention
from slicemod.kernels.fused.kernel import fused_peak
from slicemod.kernels.fused.obstacles import fused_obstacle
from slicemod.torch_internals import FakeTensor, FakeTensorMode, TorchDispatchMode

METAL = torch.device("mps")
OPERATOR = "_scaled_dot_product_attention_math_for_mps"


@pytest.fixture(autouse=True)
def _pytorch_2_14(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal_attention, "PYTORCH", (2, 14))


def call_of(shape: AttentionShape, dtype: torch.dtype = torch.float16, **more: Any) -> CallSpec:
    layout = Layout(mask_dims=0 if shape.mask is None else 4)
    return CallSpec(shape, dtype, METAL, layout=more.pop("layout", layout), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64, 72, 80, 96, 128, 256])
def test_pytorch_keeps_no_scores_for_these_widths(width: int, dtype: torch.dtype) -> None:
    call = call_of(AttentionShape(2, 6, 61, 53, width, dtype.itemsize, causal=True, key_heads=2), dtype)
    assert fused_obstacle(call) is None
    assert fused_peak(call) == 2 * 6 * 61 * width * dtype.itemsize  # the output, before it is laid out anew


@pytest.mark.parametrize(
    ("sizes", "more", "reason"),
    [
        ({"head_dim": 40}, {}, "wants widths of .*, got 40 and 40"),
        ({"head_dim": 160}, {}, "got 160"),
        ({"head_dim": 512}, {}, "got 512"),
        ({"value_dim": 32}, {}, "got 64 and 32"),
        ({"queries": 8}, {}, "for up to 8 queries"),
        ({"dropout": True}, {}, "no dropout"),
        ({"mask": MaskShape(1, 1, 61, 53)}, {}, "NaN for a row that may look at no key"),
        ({}, {"training": True}, "where gradients are needed"),
        ({}, {"transformed": True}, "where gradients are needed"),
        ({"itemsize": 8}, {"dtype": torch.float64}, "no float64"),
        ({}, {"layout": Layout(contiguous=False)}, "the last dimension contiguous"),
    ],
)
def test_what_pytorch_would_make_all_scores_for_is_sliced(
    sizes: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    settings: dict[str, Any] = {
        "batch": 2, "heads": 6, "queries": 61, "keys": 53, "head_dim": 64, "itemsize": 2,
    } | sizes  # fmt: skip
    obstacle = fused_obstacle(call_of(AttentionShape(**settings), **more))
    assert obstacle is not None
    assert re.search(reason, obstacle)


def test_older_versions_of_pytorch_make_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal_attention, "PYTORCH", (2, 13))
    obstacle = fused_obstacle(call_of(AttentionShape(2, 6, 61, 53, 64, 2)))
    assert obstacle == "before PyTorch 2.14, PyTorch makes all scores on Metal"


@pytest.mark.parametrize(("value", "taken"), [("1", False), ("", False), ("0", True)])
def test_pytorchs_switch_is_heeded(value: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_MPS_DISABLE_PREFILL_ATTENTION", value)
    assert (fused_obstacle(call_of(AttentionShape(2, 6, 61, 53, 64, 2))) is None) == taken


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def on_metal(*sizes: int, mode: Any) -> Tensor:
    tensor: Tensor = FakeTensor(mode, torch.empty(*sizes, dtype=torch.float16, device="meta"), METAL)
    return tensor


@pytest.mark.parametrize(("width", "kernel"), [(64, "fused"), (40, "math")])
def test_auto_takes_pytorchs_kernel_where_it_keeps_no_scores(width: int, kernel: str) -> None:
    mode = FakeTensorMode()
    query = on_metal(2, 61, 6, width, mode=mode).transpose(1, 2)
    key = on_metal(2, 53, 6, width, mode=mode).transpose(1, 2)
    with Operators() as operators:
        output, plan = planned_attention(query, key, key, slicing={"budget": "64MiB"})
    assert plan is not None
    assert plan.kernel == kernel
    assert (OPERATOR in operators.called) == (kernel == "fused")
    assert output.device.type == "mps"
    assert output.transpose(1, 2).is_contiguous()


def test_a_budget_below_the_output_is_sliced() -> None:
    mode = FakeTensorMode()
    query = on_metal(1, 6, 61, 64, mode=mode)
    plan = planned_attention(query, query, query, slicing={"budget": 6 * 61 * 64 * 2 - 1})[1]
    assert plan is not None
    assert plan.kernel == "math"
