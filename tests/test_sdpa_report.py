"""What a report of `sliced_sdpa` counts and prints."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from slicemod.call import AttentionShape
from slicemod.plan import SlicePlan
from slicemod.sdpa_mode import sliced_sdpa


def test_a_report_counts_calls_by_shape_and_plan_and_prints_them() -> None:
    query, longer = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 11, 4)
    with sliced_sdpa({"kernel": "math", "steps": 3}) as report:
        for _ in range(5):
            F.scaled_dot_product_attention(query, longer, longer)
        F.scaled_dot_product_attention(longer, longer, longer)
        F.scaled_dot_product_attention(query[:0], longer[:0], longer[:0])
    shape = str(AttentionShape(2, 3, 7, 11, 4, 4))
    ((found, plan),) = [call for call, times in report.calls.items() if times == 5]
    assert found == shape
    assert isinstance(plan, SlicePlan)
    assert (plan.kernel, plan.steps) == ("math", 3)
    assert report.shapes[shape] == 5
    assert report.kernels == {"math": 6, "none": 1}
    lines = str(report).splitlines()
    assert lines[0] == "7 calls sliced, 0 put into compiled graphs, 0 passed on to PyTorch"
    assert lines[1] == f"  5 x [{shape}]: {plan}"
    assert lines[3].endswith("nothing to attend to")
    assert repr(report) == f"<SdpaReport: {lines[0]}>"


def test_a_copy_of_a_report_is_empty() -> None:
    query = torch.randn(2, 3, 7, 4)
    with sliced_sdpa() as report:
        F.scaled_dot_product_attention(query, query, query)
    assert sum(report.calls.values()) == 1
    assert not copy.deepcopy(report).calls
