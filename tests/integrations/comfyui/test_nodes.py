from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from slicemod.config import SliceConfig
from slicemod.integrations.comfyui.nodes import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    AttentionPlans,
    SlicedAttention,
    plans_text,
)
from tests.integrations.comfyui import stand_in
from tests.integrations.comfyui.stand_in import KEY, ModelPatcher, TinyModel, sample

X, TEXT = torch.randn(2, 29, 24), torch.randn(2, 23, 24)


@pytest.fixture(autouse=True)
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)


def sliced(patcher: ModelPatcher, budget: str = "auto", kernel: str = "math") -> ModelPatcher:
    made: ModelPatcher
    (made,) = SlicedAttention().patch(patcher, budget, "exact", kernel)
    return made


def test_a_sliced_model_computes_the_same_and_the_given_one_stays_as_it_was() -> None:
    plain = ModelPatcher(TinyModel())
    ours = sliced(plain)
    torch.testing.assert_close(sample(ours, X, TEXT), sample(plain, X, TEXT))
    assert ours.model_options["slicemod"].report.kernels == {"math": 3}
    assert plain.model_options == {"transformer_options": {}}
    assert plain.wrappers == {}


def test_the_plans_are_those_of_the_last_run(caplog: pytest.LogCaptureFixture) -> None:
    ours = sliced(ModelPatcher(TinyModel()), budget="1MiB")
    for steps in (2, 5):
        sample(ours, X, TEXT, steps)
    samples = {"samples": X}
    with caplog.at_level(logging.INFO):
        told = AttentionPlans().tell(ours, samples)
    text = told["result"][1]
    assert told["result"][0] is samples
    assert told["ui"] == {"text": [text]}
    assert text in caplog.text
    first, *calls = text.splitlines()
    assert first == (
        "Sliced attention (budget='1MiB', policy='exact', kernel='math'): "
        "15 calls sliced, 0 put into compiled graphs, 0 passed on to PyTorch"
    )
    assert sorted(line.split(" x ")[0].strip() for line in calls) == ["10", "5"]
    assert all("math" in line for line in calls)


def test_a_clone_of_a_sliced_model_is_sliced_and_tells_the_same_plans() -> None:
    ours = sliced(ModelPatcher(TinyModel())).clone()
    sample(ours, X, TEXT)
    assert "3 calls sliced" in plans_text(ours)


def test_a_second_node_changes_the_settings_and_counts_alone() -> None:
    first = sliced(ModelPatcher(TinyModel()))
    second = sliced(first, kernel="fused")
    sample(second, X, TEXT)
    assert "kernel='fused'" in plans_text(second)
    assert "3 calls sliced" in plans_text(second)
    assert "0 calls sliced" in plans_text(first)
    assert [len(each) for each in second.wrappers["outer_sample"].values()] == [1]


def test_other_nodes_before_and_after_are_named() -> None:
    def sage(func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    plain = ModelPatcher(TinyModel())
    plain.model_options["transformer_options"][KEY] = sage
    ours = sliced(plain)
    sample(ours, X, TEXT)
    text = plans_text(ours)
    assert "3 calls sliced" in text
    assert 'sage, of a node before "Sliced attention"' in text
    after = ours.clone()
    after.set_model_optimized_attention(stand_in.attention_pytorch)
    sample(after, X, TEXT)
    text = plans_text(after)
    assert "0 calls sliced" in text
    assert 'of a node after "Sliced attention"' in text
    del after.model_options["transformer_options"][KEY]
    assert "took it off" in plans_text(after)


def test_a_run_without_a_call_for_slicemod_warns(caplog: pytest.LogCaptureFixture) -> None:
    ours = sliced(ModelPatcher(TinyModel()))
    sample(ours, X, TEXT)
    assert caplog.records == []
    after = ours.clone()
    after.set_model_optimized_attention(stand_in.attention_pytorch)
    sample(after, X, TEXT)
    (record,) = caplog.records
    assert (record.levelname, "no call of attention got to slicemod" in record.message) == ("WARNING", True)


def test_a_model_without_the_node_is_refused() -> None:
    with pytest.raises(ValueError, match='model: expected one that comes from the node "Sliced attention"'):
        AttentionPlans().tell(ModelPatcher(TinyModel()), {})


def test_a_wrong_budget_is_refused_before_a_run() -> None:
    assert SlicedAttention.VALIDATE_INPUTS("0.5") is True
    assert "got 'a lot'" in str(SlicedAttention.VALIDATE_INPUTS("a lot"))


def test_an_old_comfyui_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "comfy.ldm.modules.attention"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(RuntimeError, match="has no wrap_attn"):
        sliced(ModelPatcher(TinyModel()))


def test_the_nodes_are_declared_as_comfyui_reads_them() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for node in NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION))  # type: ignore[attr-defined]
        assert node.CATEGORY == "slicemod"  # type: ignore[attr-defined]
    chosen = {
        name: declared[1]["default"]
        for name, declared in SlicedAttention.INPUT_TYPES()["required"].items()
        if name != "model"
    }
    assert SliceConfig.of(chosen) == SliceConfig()
