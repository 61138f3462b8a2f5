"""Models of diffusers and transformers, small and with random weights: by `sliced_sdpa` they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod.sdpa_mode import sliced_sdpa
from tests.oracle import with_random_weights
from tests.small_models import CASES, Case, assert_close, output_and_gradients

SLICINGS: dict[str, dict[str, Any]] = {
    "three slices": {"kernel": "math", "steps": 3},
    "1 MiB": {"budget": "1MiB"},
}
every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_slicing = pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS.keys())


@every_slicing
@every_model
def test_a_model_computes_the_same_with_every_call_sliced(case: Case, slicing: dict[str, Any]) -> None:
    model = with_random_weights(case.make()).eval()
    theirs = output_and_gradients(model, case.call)
    with sliced_sdpa(slicing) as report:
        ours = output_and_gradients(model, case.call)
    assert_close(ours, theirs)
    assert sum(report.calls.values()) == case.attends
    assert slicing.get("kernel") in (None, *report.kernels)
    assert not report.passed_on


@every_model
def test_an_installed_model_computes_the_same_until_it_is_removed(case: Case) -> None:
    model = with_random_weights(case.make()).eval()
    theirs = output_and_gradients(model, case.call)
    installed = sliced_sdpa(SLICINGS["three slices"]).install(model)
    ours = output_and_gradients(model, case.call)
    assert_close(ours, theirs)
    assert sum(installed.report.calls.values()) == case.attends
    installed.remove()
    assert all("forward" not in vars(module) for module in model.modules())
    again = output_and_gradients(model, case.call)
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.checkpoints])
def test_gradient_checkpointing_of_diffusers_recomputes_sliced(name: str) -> None:
    case = CASES[name]
    model = with_random_weights(case.make())
    theirs = output_and_gradients(model.train(), case.call)
    model.enable_gradient_checkpointing()
    installed = sliced_sdpa(SLICINGS["three slices"]).install(model)
    output = case.call(model)
    forward = sum(installed.report.calls.values())
    model.zero_grad()
    output.square().mean().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert_close({"output": output.detach(), **gradients}, theirs)
    assert sum(installed.report.calls.values()) > forward


@pytest.mark.parametrize(
    "name", ["ltx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "flux", "qwen-image", "sd3"))]
)
def test_a_compiled_transformer_computes_the_same_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    model = with_random_weights(case.make()).eval()
    with torch.no_grad():
        expected = case.call(model)
        installed = sliced_sdpa(SLICINGS["three slices"]).install(model)
        output = case.call(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert sum(installed.report.in_graphs.values()) == case.attends
    assert not installed.report.calls
