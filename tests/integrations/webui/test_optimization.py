from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from slicemod import NotEnoughMemoryError
from slicemod.integrations.webui.extension import register
from slicemod.integrations.webui.settings import BUDGET, POLICY
from tests.integrations.webui.stand_in import Webui

X, TEXT = torch.randn(2, 29, 24), torch.randn(2, 23, 16)


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> Webui:
    made = Webui(monkeypatch)
    monkeypatch.setattr(sys.modules["modules.sd_hijack"], "list_optimizers", made.start, raising=False)
    register()
    made.start()
    return made


def outputs(webui: Webui, mask: Tensor | None = None) -> list[Tensor]:
    """Attention to itself and to text, and of a VAE, of both libraries."""
    outputs = []
    for library in ("ldm", "sgm"):
        outputs += [
            webui.layer(library, "CrossAttention", 24)(X),
            webui.layer(library, "CrossAttention", 24, 16)(X, TEXT, mask),
            webui.layer(library, "CrossAttention", 24, 16)(X, context=TEXT, additional_tokens=None),
            webui.layer(library, "AttnBlock")(torch.linspace(-1, 1, 2 * 32 * 5 * 7).view(2, 32, 5, 7)),
        ]
    return outputs


def forwards(webui: Webui) -> set[str]:
    return {vars(each)["forward"].__module__ for classes in webui.layers.values() for each in classes.values()}


def test_the_optimization_computes_what_the_webui_computes_and_is_undone(webui: Webui) -> None:
    theirs, before = outputs(webui), forwards(webui)
    assert webui.choose("slicemod") == "slicemod"
    assert forwards(webui) == {"slicemod.integrations.webui.sliced_forwards"}
    for ours, expected in zip(outputs(webui), theirs, strict=True):
        torch.testing.assert_close(ours, expected)
    webui.choose("sdp")
    assert forwards(webui) == before


def test_hypernetworks_are_applied(webui: Webui, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = outputs(webui)[2]
    torch.manual_seed(3)
    hypernetworks = [(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2)]
    layer = webui.layer("ldm", "CrossAttention", 24, 16)
    monkeypatch.setattr(sys.modules["modules.shared"], "loaded_hypernetworks", hypernetworks)
    theirs = layer(X, TEXT)
    assert not torch.allclose(theirs, plain)
    webui.choose("slicemod")
    torch.testing.assert_close(layer(X, TEXT), theirs)


def test_a_mask_of_keys_means_what_it_means_in_ldm(webui: Webui) -> None:
    mask = torch.rand(2, 23) < 0.5
    mask[1] = False  # an item that may look at nothing looks at all alike
    theirs = outputs(webui, mask)
    webui.choose("slicemod")
    for ours, expected in zip(outputs(webui, mask), theirs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_automatic_does_not_take_it(webui: Webui) -> None:
    assert webui.choose("Automatic") == "sdp"


def test_budget_and_policy_are_settings_beside_the_optimizations(webui: Webui) -> None:
    assert {webui.opts.data_labels[name].section for name in (BUDGET, POLICY)} == {("optimizations", "Optimizations")}
    webui.choose("slicemod")
    assert webui.opts.set(BUDGET, "1")
    with pytest.raises(NotEnoughMemoryError):
        outputs(webui)
    assert not webui.opts.set(BUDGET, "a lot")
    assert webui.opts.slicemod_budget == "1"
    assert webui.opts.set(BUDGET, "1MiB")
    assert webui.opts.set(POLICY, "doggettx")
    outputs(webui)


def test_without_a_settings_page_the_defaults_hold(webui: Webui) -> None:
    for name in (BUDGET, POLICY):
        del webui.opts.data[name], webui.opts.data_labels[name]
    theirs = outputs(webui)
    webui.choose("slicemod")
    for ours, expected in zip(outputs(webui), theirs, strict=True):
        torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_upcast_attention_leaves_autocast_and_is_as_accurate(webui: Webui) -> None:
    layer = webui.layer("ldm", "CrossAttention", 24, 16)
    exact = layer.double()(X.double(), TEXT.double()).float()
    layer.float()
    webui.choose("slicemod")

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return float((layer(X, TEXT) - exact).abs().mean())

    without = error()
    assert webui.left_autocast == [False]
    webui.opts.data["upcast_attn"] = True
    assert error() <= 1.5 * without
    assert webui.left_autocast == [False, True]


def test_what_the_webuis_attention_would_leave_out_is_refused(webui: Webui) -> None:
    webui.choose("slicemod")
    with pytest.raises(ValueError, match="n_times_crossframe_attn_in_self: expected none"):
        webui.layer("sgm", "CrossAttention", 24)(X, n_times_crossframe_attn_in_self=2)
