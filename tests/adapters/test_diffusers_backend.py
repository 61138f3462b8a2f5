"""`model.set_attention_backend("slicemod")`: what diffusers' native backend computes, in slices."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import diffusers.hooks
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor

from slicemod import register_diffusers_backend
from slicemod.sdpa_report import SdpaReport
from tests.oracle import with_random_weights
from tests.pytorch_versions import enters_objects_in_graphs, refuses_masks_of_causal_calls
from tests.small_models import CASES, assert_close, output_and_gradients

THREE: dict[str, Any] = {"kernel": "math", "steps": 3}


@pytest.fixture(autouse=True)
def _native_again() -> Iterator[None]:
    """`set_attention_backend` sets the backend of the whole process, too."""
    with attention_backend("native"):
        yield


@pytest.fixture
def report() -> SdpaReport:
    return register_diffusers_backend(THREE)


def attend(backend: str, *tensors: Tensor, **settings: Any) -> list[Tensor]:
    """The output, and the gradients of query, key and value. Sizes are `(B, N, H, D)`."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = dispatch_attention_fn(*leaves, backend=backend, **settings)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def tensors(kv_heads: int = 6) -> list[Tensor]:
    return [torch.randn(2, 11, 6, 4), torch.randn(2, 7, kv_heads, 4), torch.randn(2, 7, kv_heads, 4)]


DEAD = torch.tensor([True, False, True, False, False, True, True])
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "scale": lambda: {"scale": 0.3},
    "mask of keys": lambda: {"attn_mask": torch.stack([DEAD, ~DEAD])},
    "mask of queries and keys": lambda: {"attn_mask": torch.rand(11, 7) > 0.5},
    "mask of one item": lambda: {"attn_mask": torch.rand(1, 11, 7) > 0.5},
    "mask of all items": lambda: {"attn_mask": torch.rand(2, 1, 11, 7) > 0.5},
    "mask of all heads": lambda: {"attn_mask": torch.rand(2, 6, 11, 7) > 0.5},
    "added to keys": lambda: {"attn_mask": torch.randn(2, 7)},
    "added": lambda: {"attn_mask": torch.randn(2, 6, 11, 7)},
    "dead rows": lambda: {"attn_mask": torch.stack([DEAD, torch.zeros(7, dtype=torch.bool)])},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_call_means_what_it_means_to_the_native_backend(
    settings: Callable[[], dict[str, Any]], report: SdpaReport
) -> None:
    given, settled = tensors(), settings()
    theirs = attend("native", *given, **settled)
    torch.testing.assert_close(attend("slicemod", *given, **settled), theirs)
    assert report.kernels == {"math": 1}
    assert not report.passed_on


def test_grouped_queries_share_their_keys(report: SdpaReport) -> None:
    given = tensors(kv_heads=3)
    theirs = attend("native", *given, enable_gqa=True)
    torch.testing.assert_close(attend("slicemod", *given, enable_gqa=True), theirs)
    assert report.kernels == {"math": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_mask": torch.ones(2, 11, 7, dtype=torch.bool)},  # of each item, but no dimension for heads
        {"attn_mask": torch.ones(2, 7, dtype=torch.int64)},
        pytest.param({"attn_mask": torch.ones(11, 7), "is_causal": True}, marks=refuses_masks_of_causal_calls),
        {"attention_kwargs": {"return_lse": True}},
    ],
    ids=["(B, N, K)", "int", "mask and causal", "return_lse"],
)
def test_what_the_native_backend_refuses_is_refused_in_its_words(settings: dict[str, Any], report: SdpaReport) -> None:
    given = tensors()
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        attend("native", *given, **settings)
    with pytest.raises(type(theirs.value)) as ours:
        attend("slicemod", *given, **settings)
    assert str(ours.value) == str(theirs.value)
    assert not report.kernels


@pytest.mark.usefixtures("report")
def test_attention_over_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not split attention over devices.*native"):
        dispatch_attention_fn(*tensors(), backend="slicemod", parallel_config=object())


@pytest.mark.parametrize("name", ["flux", "wan", "qwen-image", "ltx"])
def test_a_model_computes_the_same_with_every_call_sliced(name: str, report: SdpaReport) -> None:
    case = CASES[name]
    model = with_random_weights(case.make()).eval()
    theirs = output_and_gradients(model, case.call)
    model.set_attention_backend("slicemod")
    assert_close(output_and_gradients(model, case.call), theirs)
    assert sum(report.calls.values()) == case.attends
    assert set(report.kernels) == {"math"}


@enters_objects_in_graphs
@pytest.mark.parametrize(
    "name", ["ltx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "wan", "qwen-image"))]
)
def test_a_compiled_model_computes_the_same_in_one_graph(name: str, report: SdpaReport) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    model = with_random_weights(case.make()).eval()
    with torch.no_grad():
        theirs = case.call(model)
        model.set_attention_backend("slicemod")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(case.call(compiled), theirs, atol=1e-5, rtol=1e-5)
    assert sum(report.in_graphs.values()) == case.attends
    assert not report.calls


def test_settings_given_anew_hold_for_models_that_have_the_backend_already(report: SdpaReport) -> None:
    model = with_random_weights(CASES["ltx"].make()).eval()
    model.set_attention_backend("slicemod")
    CASES["ltx"].call(model)
    again = register_diffusers_backend({"kernel": "fused"})
    CASES["ltx"].call(model)
    assert (report.kernels, again.kernels) == ({"math": 2}, {"fused": 2})


@pytest.mark.usefixtures("report")
def test_reset_attention_backend_leaves_the_backend_of_the_process() -> None:
    """A fault of diffusers', which docs/hosts.md names; this fails when it is mended."""
    model = CASES["ltx"].make()
    model.set_attention_backend("slicemod")
    model.reset_attention_backend()
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == "slicemod"


def test_perturbed_attention_guidance_still_takes_the_place_of_attention(report: SdpaReport) -> None:
    case = CASES["qwen-image"]
    model = with_random_weights(case.make()).eval()
    config = diffusers.hooks.LayerSkipConfig([0], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    unguided = case.call(model)
    diffusers.hooks.apply_layer_skip(model, config)
    guided = case.call(model)
    assert not torch.allclose(guided, unguided)
    model.set_attention_backend("slicemod")
    torch.testing.assert_close(case.call(model), guided, atol=1e-5, rtol=1e-5)
    assert sum(report.calls.values()) == case.attends - 1


@pytest.mark.usefixtures("report")
def test_the_backend_has_a_name_among_diffusers_own() -> None:
    name = AttentionBackendName("slicemod")
    assert list(AttentionBackendName)[-1] is name is AttentionBackendName["SLICEMOD"]
    assert pickle.loads(pickle.dumps(name)) is copy.deepcopy(name) is name
    register_diffusers_backend()
    assert AttentionBackendName("slicemod") is name
    assert list(AttentionBackendName).count(name) == 1


@pytest.mark.parametrize("name", ["AttentionBackendName", "_AttentionBackendRegistry"])
def test_an_error_says_which_name_of_diffusers_is_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention_dispatch, name)
    with pytest.raises(ImportError, match=rf"expected diffusers.models.attention_dispatch to have {name}.*sliced_sdpa"):
        register_diffusers_backend()


@pytest.mark.parametrize("name", ["register", "_backends"])
def test_an_error_says_which_name_of_the_registry_is_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention_dispatch._AttentionBackendRegistry, name)
    with pytest.raises(ImportError, match=f"expected _AttentionBackendRegistry to have {name}"):
        register_diffusers_backend()


def test_an_error_says_what_an_enum_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    names = types.SimpleNamespace(
        __name__="AttentionBackendName", NATIVE=AttentionBackendName.NATIVE, _member_names_=[], _member_map_={}
    )
    monkeypatch.setattr(attention_dispatch, "AttentionBackendName", names)
    with pytest.raises(ImportError, match="expected AttentionBackendName to have _value2member_map_"):
        register_diffusers_backend()


def test_settings_are_checked_when_they_are_given() -> None:
    with pytest.raises(ValueError, match="expected keys out of budget"):
        register_diffusers_backend({"budgte": 1})
