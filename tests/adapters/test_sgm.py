"""The attention mode that importing slicemod.adapters.sgm gives to Stability's sgm, or to a stand-in for it."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from slicemod import MemoryAwareCrossAttention, SliceConfig, restore_attention, swap_attention
from tests.adapters import sgm_stand_in

SGM_IS_INSTALLED = importlib.util.find_spec("sgm") is not None
without_sgm = pytest.mark.skipif(SGM_IS_INSTALLED, reason="sgm is installed")
MATH = {"kernel": "math", "steps": 7}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    if SGM_IS_INSTALLED:
        return importlib.import_module("slicemod.adapters.sgm")
    return sgm_stand_in.import_adapter(monkeypatch)


@pytest.fixture
def attention(adapter: Any) -> Any:
    return importlib.import_module("sgm.modules.attention")


def block(attention: Any, mode: str, **more: Any) -> Any:
    torch.manual_seed(3)
    return attention.BasicTransformerBlock(32, 2, 16, context_dim=23, attn_mode=mode, checkpoint=False, **more)


def test_the_mode_makes_sliced_layers_with_the_weights_that_softmax_would_have(attention: Any) -> None:
    ours, theirs = block(attention, "softmax-sliced"), block(attention, "softmax")
    assert isinstance(ours.attn1, MemoryAwareCrossAttention)
    assert isinstance(ours.attn2, MemoryAwareCrossAttention)
    assert not isinstance(theirs.attn1, MemoryAwareCrossAttention)
    assert ours.attn1.slicing == SliceConfig()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_a_block_computes_what_softmax_computes(adapter: Any, attention: Any) -> None:
    adapter.register("softmax-in-seven", MATH)
    ours, theirs = block(attention, "softmax-in-seven"), block(attention, "softmax")
    x, context = torch.randn(2, 61, 32), torch.randn(2, 53, 23)
    torch.testing.assert_close(ours(x, context), theirs(x, context))
    assert ours.attn1.plan.steps == 7


def test_the_mode_may_come_by_position_too(attention: Any) -> None:
    made = attention.BasicTransformerBlock(32, 2, 16, 0.0, 23, True, False, False, "softmax-sliced")
    assert isinstance(made.attn1, MemoryAwareCrossAttention)


def test_other_blocks_know_the_mode_and_no_block_keeps_a_trace_of_it(attention: Any) -> None:
    video = importlib.import_module("sgm.modules.video_attention")
    for kind in (attention.BasicTransformerSingleLayerBlock, video.VideoTransformerBlock):
        assert isinstance(kind(32, 2, 16, attn_mode="softmax-sliced").attn1, MemoryAwareCrossAttention)
    assert "ATTENTION_MODES" not in vars(block(attention, "softmax-sliced"))


def test_settings_of_a_mode_can_be_changed_for_models_yet_to_be_built(adapter: Any, attention: Any) -> None:
    for steps in (3, 5):
        adapter.register("softmax-mine", {"steps": steps})
        assert block(attention, "softmax-mine").attn1.slicing == SliceConfig(steps=steps)


def test_a_name_of_sgms_own_is_refused(adapter: Any) -> None:
    with pytest.raises(ValueError, match="mode: expected a name that sgm does not use; got 'softmax'"):
        adapter.register("softmax")


def test_a_backend_is_refused_since_the_plan_chooses_the_kernel(adapter: Any) -> None:
    assert isinstance(adapter.SlicedCrossAttention(32, backend=None), MemoryAwareCrossAttention)
    with pytest.raises(ValueError, match="sdp_backend: expected None where attention is sliced; got 'flash'"):
        adapter.SlicedCrossAttention(32, backend="flash")


def test_an_unknown_mode_is_still_an_error_of_sgms(attention: Any) -> None:
    with pytest.raises(AssertionError):
        block(attention, "softmax-slided")


def test_layers_of_a_model_that_is_built_are_swapped_with_all_their_arguments(attention: Any) -> None:
    """The stand-in computes what sgm does by other code, which is not known: it has to be chosen."""
    model = nn.Sequential(attention.CrossAttention(32, None, 2, 16))
    x, tokens, mask = torch.randn(4, 61, 32), torch.randn(4, 5, 32), torch.rand(4, 1, 61, 61) > 0.4
    calls: list[dict[str, Any]] = [
        {},
        {"additional_tokens": tokens},
        {"n_times_crossframe_attn_in_self": 2},
        {"mask": mask},
    ]
    expected = [model[0](x, **call) for call in calls]
    with swap_attention(model, MATH, filter_fn=lambda name, module: True):
        for call, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(model[0](x, **call), wanted)
    assert restore_attention(model) == 0


@without_sgm
def test_an_sgm_without_video_models_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sgm_stand_in.import_adapter(monkeypatch, video=False)
    attention = importlib.import_module("sgm.modules.attention")
    assert isinstance(block(attention, "softmax-sliced").attn1, MemoryAwareCrossAttention)


@without_sgm
def test_without_sgm_the_import_says_what_to_install() -> None:
    program = "import slicemod.adapters.sgm"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "slicemod.adapters.sgm: expected Stability's package sgm; it is not installed. Install it" in ran.stderr
