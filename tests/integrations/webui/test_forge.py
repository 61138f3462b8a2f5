from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from slicemod import NotEnoughMemoryError
from slicemod.integrations.webui.extension import register
from slicemod.integrations.webui.settings import BUDGET, ENABLED, POLICY
from tests.integrations.comfyui.stand_in import attention_pytorch
from tests.integrations.webui.stand_in import Webui, add_forge, spatial_attention

MODELS = ("unet", "flux", "chroma")


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> Webui:
    return Webui(monkeypatch)


@pytest.fixture
def forge(webui: Webui, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    modules = add_forge(monkeypatch)
    register()
    webui.start()
    return modules


def attention_of(forge: dict[str, ModuleType], model: str) -> Any:
    return forge[f"backend.nn.{model}"].attention_function


def is_forges_own(forge: dict[str, ModuleType]) -> bool:
    models = all(attention_of(forge, model) is attention_pytorch for model in MODELS)
    return models and forge["backend.nn.vae"].attention_function_single_head_spatial is spatial_attention


def test_it_is_off_until_it_is_switched_on_and_off_again(webui: Webui, forge: dict[str, ModuleType]) -> None:
    clip = attention_of(forge, "clip")
    assert is_forges_own(forge)
    assert webui.opts.set(ENABLED, True)
    assert all(attention_of(forge, model) is not attention_pytorch for model in MODELS)
    assert attention_of(forge, "clip") is clip
    assert forge["backend.attention"].attention_function is attention_pytorch
    assert webui.opts.set(ENABLED, False)
    assert is_forges_own(forge)


def test_models_compute_what_they_computed(webui: Webui, forge: dict[str, ModuleType]) -> None:
    webui.opts.set(ENABLED, True)
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, tokens, 21) for tokens in (29, 23, 23))
    heads_apart = torch.randn(3, 2, 3, 29, 8).unbind()
    mask = torch.randn(2, 1, 29, 23)
    for model in MODELS:
        attention = attention_of(forge, model)
        torch.testing.assert_close(attention(query, key, value, 3, mask), attention_pytorch(query, key, value, 3, mask))
        expected = attention_pytorch(*heads_apart, 3, skip_reshape=True)
        torch.testing.assert_close(attention(*heads_apart, 3, skip_reshape=True), expected)


def test_models_that_only_kin_of_forge_have_are_taken_too(
    webui: Webui, forge: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "backend.nn.chroma")
    wan = ModuleType("backend.nn.wan")
    vars(wan)["attention_function"] = attention_pytorch
    monkeypatch.setitem(sys.modules, "backend.nn.wan", wan)
    assert webui.opts.set(ENABLED, True)
    given = torch.randn(3, 2, 29, 21).unbind()
    ours = wan.attention_function
    assert ours is not attention_pytorch
    torch.testing.assert_close(
        ours(*given, 3, mask=None, transformer_options={}, enable_gqa=False), attention_pytorch(*given, 3)
    )


@pytest.mark.parametrize("size", [(5, 7), (3, 5, 7)], ids=["image", "video"])
def test_a_vae_computes_what_it_computed(size: tuple[int, ...], webui: Webui, forge: dict[str, ModuleType]) -> None:
    webui.opts.set(ENABLED, True)
    pixels = torch.randn(3, 2, 32, *size).unbind()
    ours = forge["backend.nn.vae"].attention_function_single_head_spatial(*pixels)
    torch.testing.assert_close(ours, spatial_attention(*pixels))


def test_a_setting_that_was_saved_holds_from_the_start_on(webui: Webui, forge: dict[str, ModuleType]) -> None:
    webui.opts.data[ENABLED] = True
    for callback in webui.callbacks["before_ui"]:
        callback()
    assert not is_forges_own(forge)
    for callback in webui.callbacks["script_unloaded"]:
        callback()
    assert is_forges_own(forge)


def test_budget_and_policy_hold_at_once_and_wrong_ones_are_taken_back(
    webui: Webui, forge: dict[str, ModuleType]
) -> None:
    webui.opts.set(ENABLED, True)
    given = torch.randn(3, 2, 29, 21).unbind()
    for name, value in ((POLICY, "doggettx"), (BUDGET, "1MiB")):
        assert webui.opts.set(name, value)
        attention_of(forge, "unet")(*given, 3)
    assert webui.opts.set(BUDGET, "1")
    with pytest.raises(NotEnoughMemoryError):
        attention_of(forge, "unet")(*given, 3)
    assert not webui.opts.set(BUDGET, "a lot")
    assert webui.opts.slicemod_budget == "1"


def test_a_webui_of_another_kind_is_refused(webui: Webui) -> None:
    with pytest.raises(RuntimeError, match="got neither"):
        register()
