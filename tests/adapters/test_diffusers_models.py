"""diffusers' models, small and with random weights: swapped they compute the same, by their own checkpointing too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "rows": {"kernel": "math", "steps": 7},
    "exact": {"kernel": "math", "budget": "64KiB", "policy": "exact"},
}
every_slicing = pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS.keys())
SMALL: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
TEXT_MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)


@dataclass(frozen=True)
class Case:
    """A model, how many attention layers it has, and a call that returns tensors."""

    make: Callable[[], Any]
    layers: int
    call: Callable[[Any], list[Tensor]]


def noisy() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def text(width: int = 23) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(2))


def conditional(**config: Any) -> Any:
    down = config.pop("down", ("CrossAttnDownBlock2D", "DownBlock2D"))
    up = config.pop("up", ("UpBlock2D", "CrossAttnUpBlock2D"))
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "cross_attention_dim": 23, **SMALL}
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **{**sizes, **config})


def denoise(model: Any, **more: Any) -> list[Tensor]:
    width = model.config.cross_attention_dim
    return [model(noisy(), torch.tensor([3, 500]), text(width), **more).sample]


def sdxl() -> Any:
    return conditional(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        down=("DownBlock2D", "CrossAttnDownBlock2D"),
        up=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def denoise_sdxl(model: Any) -> list[Tensor]:
    return denoise(model, added_cond_kwargs={"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)})


def added_projections(**config: Any) -> Any:
    """The attention of DeepFloyd IF, Kandinsky and unCLIP."""
    return conditional(
        down=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=8,
        **{"cross_attention_dim": 24, **config},
    )


def fused(model: Any) -> Any:
    """With projections of query, key and value in one, beside those that they were made from."""
    model.fuse_qkv_projections()
    return model


def control(model: Any) -> list[Tensor]:
    output = model(noisy(), torch.tensor([3, 500]), text(), torch.ones(2, 3, 16, 16))
    return [*output.down_block_res_samples, output.mid_block_res_sample]


def unconditional() -> Any:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes = {"sample_size": 8, "attention_head_dim": 8, **SMALL}
    return UNet2DModel(down_block_types=down, up_block_types=up, **sizes)


def autoencode(model: Any) -> list[Tensor]:
    latents = model.encode(noisy()).latent_dist.mean
    return [latents, model.decode(latents).sample]


CASES: dict[str, Case] = {
    "sd1": Case(lambda: conditional(attention_head_dim=8), 8, denoise),
    "sd2": Case(
        lambda: conditional(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True), 8, denoise
    ),
    "sdxl": Case(sdxl, 16, denoise_sdxl),
    "fused projections": Case(lambda: fused(conditional(attention_head_dim=8)), 8, denoise),
    "fused autoencoder": Case(lambda: fused(AutoencoderKL(latent_channels=5, **_two_blocks())), 2, autoencode),
    "text mask": Case(
        lambda: conditional(attention_head_dim=8), 8, lambda model: denoise(model, encoder_attention_mask=TEXT_MASK)
    ),
    "added projections": Case(added_projections, 4, denoise),
    "added projections, text mask": Case(
        added_projections, 4, lambda model: denoise(model, encoder_attention_mask=TEXT_MASK)
    ),
    "added projections only": Case(lambda: added_projections(mid_block_only_cross_attention=True), 4, denoise),
    "added projections, context norm": Case(
        lambda: added_projections(cross_attention_norm="group_norm", cross_attention_dim=32), 4, denoise
    ),
    "controlnet": Case(
        lambda: ControlNetModel(
            in_channels=3,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            attention_head_dim=8,
            cross_attention_dim=23,
            conditioning_embedding_out_channels=(16, 32),
            **SMALL,
        ),
        4,
        control,
    ),
    "unconditional": Case(unconditional, 4, lambda model: [model(noisy(), 3).sample]),
    "autoencoder": Case(lambda: AutoencoderKL(latent_channels=5, **_two_blocks()), 2, autoencode),
}


def _two_blocks() -> dict[str, Any]:
    return {
        **SMALL,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }


def results(model: nn.Module, call: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    """The outputs, and the gradients of the parameters they depend on."""
    outputs = call(model)
    loss = torch.cat([output.flatten() for output in outputs]).square().sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [*(output.detach() for output in outputs), *(grad for grad in grads if grad is not None)]


def attention_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]


@every_slicing
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_swapped_model_computes_the_same_and_comes_back(case: Case, slicing: dict[str, Any]) -> None:
    model = with_random_weights(case.make())
    expected, keys = results(model, case.call), list(model.state_dict())
    processors = {name: layer.processor for name, layer in attention_layers(model)}
    with swap_attention(model, slicing) as report:
        assert len(report.layers) == case.layers
        assert report.skipped == ()
        assert list(model.state_dict()) == keys
        assert_same(results(model, case.call), expected)
        assert all(layer.plan is not None for layer in report.layers)
    assert all(layer.processor is processors[name] for name, layer in attention_layers(model))
    assert all(map(torch.equal, results(model, case.call), expected))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "added projections", "controlnet", "unconditional", "autoencoder"])
def test_the_hosts_own_checkpointing_gives_the_same(name: str) -> None:
    case = CASES[name]
    model = with_random_weights(case.make())
    expected = results(model, case.call)
    model.enable_gradient_checkpointing()
    assert len(swap_attention(model, SLICINGS["rows"]).layers) == case.layers
    assert_same(results(model, case.call), expected)


@pytest.mark.parametrize("name", ["sd1", "added projections"])
def test_a_model_that_slices_by_diffusers_own_way_is_swapped_and_goes_back_to_it(name: str) -> None:
    case = CASES[name]
    model = with_random_weights(case.make())
    expected = results(model, case.call)
    model.set_attention_slice(1)
    sliced = model.attn_processors
    swap_attention(model, SLICINGS["rows"])
    assert_same(results(model, case.call), expected)
    restore_attention(model)
    assert all(model.attn_processors[layer] is processor for layer, processor in sliced.items())


def test_projections_fused_after_the_swap_want_another_one_and_can_be_unfused() -> None:
    case = CASES["sd1"]
    model = with_random_weights(case.make())
    expected, before = results(model, case.call), model.attn_processors
    swap_attention(model, SLICINGS["rows"])
    swapped = model.attn_processors
    model.fuse_qkv_projections()  # which sets processors of its own
    report = swap_attention(model, SLICINGS["rows"])
    torch.testing.assert_close(case.call(model)[0], expected[0], rtol=1e-3, atol=1e-4)
    assert all(layer.plan is not None for layer in report.layers)
    model.unfuse_qkv_projections()
    assert all(model.attn_processors[name] is processor for name, processor in swapped.items())
    assert restore_attention(model) == case.layers
    assert all(model.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("name", ["sd1", "autoencoder"])
def test_a_model_may_be_moved_before_and_after_the_swap(name: str) -> None:
    case = CASES[name]
    model = with_random_weights(case.make())
    expected = results(model, case.call)
    swap_attention(model, SLICINGS["rows"])
    model.double()
    assert_same(results(model.float(), case.call), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
