"""Hosts inside torch.compile: swapped before or after, whole graphs, checkpointing, new settings."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock as DiffusersBlock
from ldm.modules.attention import BasicTransformerBlock as LDMBlock
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slicemod.plan import NotEnoughMemoryError
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

MATH: dict[str, Any] = {"kernel": "math", "steps": 7}
pytestmark = pytest.mark.usefixtures("omegaconf")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def diffusers_unet() -> Any:
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=23,
    )
    return with_random_weights(model)


def ldm_unet() -> Any:
    model: nn.Module = UNetModel(
        image_size=8,
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(1,),
        channel_mult=(1,),
        num_head_channels=16,
        use_spatial_transformer=True,
        context_dim=23,
        legacy=False,
    )
    return with_random_weights(model)


def inputs(side: int = 8) -> list[Tensor]:
    return [torch.randn(2, 3, side, side), torch.tensor([3, 500]), torch.randn(2, 5, 23)]


def output(model: Any, given: list[Tensor]) -> Tensor:
    result: Any = model(*given)
    tensor: Tensor = result if isinstance(result, Tensor) else result.sample
    return tensor


def results(model: Any, given: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of all parameters."""
    out = output(model, given)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def compiled(model: Any, **more: Any) -> Any:
    return torch.compile(model, backend="aot_eager", **more)


@pytest.mark.parametrize(
    "make", [diffusers_unet, pytest.param(ldm_unet, marks=pytest.mark.slow)], ids=["diffusers", "LDM"]
)
def test_a_compiled_swapped_unet_is_one_graph_and_computes_the_same(make: Any) -> None:
    model, given = make(), inputs()
    expected = results(model, given)
    swap_attention(model, MATH)
    assert_same(results(compiled(model, fullgraph=True), given), expected)


def diffusers_block() -> Any:
    return DiffusersBlock(32, 2, 16)


def ldm_block() -> Any:
    return LDMBlock(32, 2, 16, checkpoint=False)


@pytest.mark.slow
@pytest.mark.parametrize("make", [diffusers_block, ldm_block], ids=["diffusers", "LDM"])
def test_the_default_compiler_gives_the_same(make: Any) -> None:
    model, given = with_random_weights(nn.Sequential(make())), [torch.randn(2, 61, 32)]
    expected = results(model, given)
    swap_attention(model, MATH)
    assert_same(results(torch.compile(model, fullgraph=True), given), expected)


@pytest.mark.parametrize(
    "make", [diffusers_block, pytest.param(ldm_block, marks=pytest.mark.slow)], ids=["diffusers", "LDM"]
)
def test_a_model_that_is_compiled_already_can_be_swapped_changed_and_restored(make: Any) -> None:
    model = with_random_weights(nn.Sequential(make()))
    ours, x = compiled(model), torch.randn(2, 61, 32)
    with torch.no_grad():
        expected = ours(x)
        for steps in (3, 7):
            report = swap_attention(ours, {"kernel": "math", "steps": steps})
            assert report.layers[0].name == "_orig_mod.0.attn1"
            torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)
        assert restore_attention(ours) == len(report.layers)
        assert torch.equal(ours(x), expected)


@pytest.mark.slow
def test_checkpointed_blocks_are_compiled_too() -> None:
    model, given = diffusers_unet(), inputs()
    expected = results(model, given)
    # Its own default looks at PyTorch's version in the graph, which the compiler does not take.
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    swap_attention(model, MATH)
    assert_same(results(compiled(model), given), expected)


def test_a_compiled_block_of_a_vae_computes_the_same() -> None:
    model, x = with_random_weights(nn.Sequential(AttnBlock(32))), torch.randn(2, 32, 7, 11)
    expected = model(x)
    swap_attention(model, MATH)
    torch.testing.assert_close(compiled(model, fullgraph=True)(x), expected, rtol=1e-3, atol=1e-4)


def test_new_settings_of_a_compiled_layer_count() -> None:
    """A layer of which the plan is a constant of the graph: the graph is made anew."""
    model, x = with_random_weights(nn.Sequential(AttnBlock(32))), torch.randn(1, 32, 29, 31)
    ours = compiled(model)
    swap_attention(model, {"kernel": "math", "budget": "2MiB", "policy": "exact"})
    ours(x)
    swap_attention(model, {"budget": 100, "policy": "exact"})
    with pytest.raises(NotEnoughMemoryError, match=r"exact: needs [0-9,]+ bytes and has 100 bytes, for"):
        ours(x)
