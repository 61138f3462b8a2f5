"""The feed-forwards of diffusers' and LDM's own blocks, swapped and restored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock as DiffusersBlock
from diffusers.models.attention import FeedForward
from ldm.modules.attention import BasicTransformerBlock as LDMBlock
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory
from slicemod.feed_forward.layer import SlicedFeedForward
from slicemod.feed_forward.plan import FeedForwardPlan
from slicemod.swap import restore_attention, swap_attention
from tests.adapters.test_lora import add_lora
from tests.oracle import assert_same, with_random_weights
from tests.processors import MULTIPLIES_BFLOAT16

SMALL: dict[str, Any] = {"budget": "400KiB"}
MAKES: dict[str, Any] = {
    "diffusers": lambda: nn.Sequential(*(DiffusersBlock(32, 2, 16, activation_fn=name) for name in ("geglu", "gelu"))),
    "LDM": lambda: nn.Sequential(*(LDMBlock(32, 2, 16, gated_ff=gated, checkpoint=False) for gated in (True, False))),
}
both = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def given() -> Tensor:
    return torch.randn(2, 613, 32, generator=torch.Generator().manual_seed(1))


def results(model: Any) -> list[Tensor]:
    """The output, and the gradients of the parameters that are trained."""
    output = model(given())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), trained)]


def plans(report: Any) -> list[FeedForwardPlan]:
    return [layer.plan for layer in report.layers if layer.role == "feed-forward"]


@both
def test_a_swapped_block_computes_the_same_and_comes_back(make: Any) -> None:
    model = with_random_weights(make())
    expected, before, keys = results(model), list(model.named_modules()), list(model.state_dict())
    attentions = len(swap_attention(model, SMALL).layers)
    restore_attention(model)
    report = swap_attention(model, SMALL, feed_forward=True)
    roles = [layer.role for layer in report.layers]
    assert (roles.count("attention"), roles.count("feed-forward")) == (attentions, 2)
    assert f"swapped {attentions} attention layers and 2 feed-forwards (budget='400KiB'" in str(report)
    assert list(model.state_dict()) == keys
    assert_same(results(model), expected)
    assert all(plan.steps > 2 and plan.checkpoint for plan in plans(report))
    assert restore_attention(model) == attentions + 2
    assert list(model.named_modules()) == before


@both
def test_feed_forwards_are_left_alone_unless_they_are_asked_for(make: Any) -> None:
    model = make()
    report = swap_attention(model, SMALL)
    assert {layer.role for layer in report.layers} == {"attention"}
    assert not any(isinstance(module, SlicedFeedForward) for module in model.modules())
    swap_attention(model, SMALL, feed_forward=True)
    swap_attention(model, {"budget": "1MiB"})
    settings = [module.slicing.budget for module in model.modules() if isinstance(module, SlicedFeedForward)]
    assert settings == ["400KiB"] * 2


@both
def test_a_with_statement_gives_the_same_objects_back(make: Any) -> None:
    model = make()
    before = list(model.named_modules())
    with swap_attention(model, SMALL, feed_forward=True):
        assert list(model.named_modules()) != before
    assert list(model.named_modules()) == before


@both
def test_lora_before_and_after_the_swap_is_kept(make: Any) -> None:
    peft = pytest.importorskip("peft")
    names = ["net.0.proj", "net.2", "net.0.0"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False)
    for first in ("lora", "swap"):
        torch.manual_seed(3)
        model = with_random_weights(make())
        if first == "swap":
            swap_attention(model, SMALL, feed_forward=True)
        peft.inject_adapter_in_model(config, model)
        restore_attention(model)
        expected = results(model)
        assert any("lora_" in name for name in model.state_dict())
        with swap_attention(model, SMALL, feed_forward=True) as report:
            assert_same(results(model), expected)
            assert len(plans(report)) == 2


def test_a_wrapper_of_another_make_is_kept_too() -> None:
    model = with_random_weights(MAKES["LDM"]())
    add_lora(model, ("net.0.proj", "net.2", "net.0.0"))
    expected = results(model)
    with swap_attention(model, SMALL, feed_forward=True):
        assert_same(results(model), expected)


def test_hooks_of_the_layer_see_the_whole_and_stay() -> None:
    model = MAKES["diffusers"]()
    seen: list[torch.Size] = []
    handle = model[0].ff.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    swap_attention(model, SMALL, feed_forward=True)
    model(given())
    assert seen == [given().shape]
    handle.remove()
    model(given())
    assert len(seen) == 1


def test_a_copy_of_a_swapped_model_is_restored_on_its_own() -> None:
    model = MAKES["diffusers"]()
    expected = model(given())
    swap_attention(model, SMALL, feed_forward=True)
    other = copy.deepcopy(model)
    assert restore_attention(other) == 4
    assert torch.equal(other(given()), expected)
    assert isinstance(model[0].ff, SlicedFeedForward)


def skipped(model: nn.Module, name: str) -> str:
    with pytest.warns(UserWarning, match="was swapped in part"):
        report = swap_attention(model, SMALL, feed_forward=True)
    return dict(report.skipped)[name]


def test_a_changed_forward_is_left_alone_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MAKES["diffusers"]()
    model[0].ff.forward = lambda hidden_states: 2 * hidden_states
    assert skipped(model, "0.ff") == "its forward was replaced on the object itself"
    monkeypatch.setattr(FeedForward, "forward", lambda self, hidden_states: hidden_states)
    assert "forward of its class FeedForward was replaced" in skipped(MAKES["diffusers"](), "0.ff")


class MeanOfTokens(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 4 * channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        projected: Tensor = self.proj(hidden_states)
        return projected.mean(-2, keepdim=True)


def test_an_activation_that_may_look_at_other_tokens_is_left_alone() -> None:
    model = MAKES["diffusers"]()
    model[0].ff.net[0] = MeanOfTokens(32)
    assert "its activation MeanOfTokens is not known to compute each token by itself" in skipped(model, "0.ff")


def test_a_net_of_other_parts_is_left_alone() -> None:
    model = MAKES["LDM"]()
    model[0].ff.net[1] = nn.LayerNorm(128)
    assert skipped(model, "0.ff") == "its net is GEGLU, LayerNorm, Linear"


@both
def test_a_compiled_swapped_block_is_one_graph(make: Any) -> None:
    torch._dynamo.reset()
    model = with_random_weights(make())
    expected = results(model)
    swap_attention(model, SMALL, feed_forward=True)
    assert_same(results(torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


@torch.no_grad()
def test_the_peak_of_a_unet_is_no_longer_that_of_its_feed_forwards() -> None:
    """As the UNet of SD1.5 at 1024x1024, with a fifth of the channels: feed-forwards are the largest there too."""
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    inputs = torch.randn(1, 4, 64, 64), 3, torch.randn(1, 7, 64)

    def peak(**more: Any) -> int:
        swap_attention(unet, {"budget": "2MiB"}, **more)
        unet(*inputs)
        return peak_memory(lambda: unet(*inputs))

    alone = peak()
    assert peak(feed_forward=True) <= 0.68 * alone


@pytest.mark.slow
@MULTIPLIES_BFLOAT16
@torch.no_grad()
def test_stable_diffusion_at_1024_pixels_peaks_at_175_mib() -> None:
    """It was 260 MiB with any attention. The plans are those of "auto"."""
    unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768).bfloat16()
    inputs = torch.randn(1, 4, 128, 128).bfloat16(), 3, torch.randn(1, 77, 768).bfloat16()
    swap_attention(unet, feed_forward=True)
    assert peak_memory(lambda: unet(*inputs)) <= 175 * 2**20
