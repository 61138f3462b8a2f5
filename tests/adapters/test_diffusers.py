"""A small diffusers UNet and its attention layers, swapped and restored."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor, nn

from slicemod.adapters.diffusers import SlicemodAttnProcessor
from slicemod.bench.memory import peak_memory
from slicemod.config import SliceConfig
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same

SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "rows": {"kernel": "math", "steps": 7},
    "exact": {"kernel": "math", "budget": "64KiB", "policy": "exact"},
}
every_slicing = pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS.keys())
LAYERS = 14


def unet() -> nn.Module:
    model: nn.Module = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=23,
    )
    return model


@pytest.fixture
def model() -> nn.Module:
    return unet()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 23)


def results(model: Any, given: tuple[Tensor, Tensor, Tensor], **more: Any) -> list[Tensor]:
    """The output, and the gradients of all parameters."""
    output = model(*given, **more).sample
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(model.parameters()))]


@every_slicing
def test_a_swapped_unet_computes_the_same_and_has_the_same_gradients(model: nn.Module, slicing: dict[str, Any]) -> None:
    given = inputs()
    expected = results(model, given)
    report = swap_attention(model, slicing)
    assert len(report.layers) == LAYERS
    assert {layer.host for layer in report.layers} == {"diffusers"}
    assert_same(results(model, given), expected)
    assert all(layer.plan is not None for layer in report.layers)


@every_slicing
def test_masks_of_latents_and_of_the_context_are_those_of_diffusers(model: nn.Module, slicing: dict[str, Any]) -> None:
    given = inputs()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    expected = results(model, given, encoder_attention_mask=mask)
    swap_attention(model, slicing)
    assert_same(results(model, given, encoder_attention_mask=mask), expected)


def test_restored_outputs_are_bit_identical_and_processors_the_same_objects(model: Any) -> None:
    given, processors = inputs(), model.attn_processors
    expected = results(model, given)
    swap_attention(model, SLICINGS["rows"])
    assert restore_attention(model) == LAYERS
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    for ours, theirs in zip(results(model, given), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert restore_attention(model) == 0


def test_modules_parameters_and_state_dict_keys_stay(model: nn.Module) -> None:
    before = (list(model.named_modules()), list(model.state_dict()), list(map(id, model.parameters())))
    swap_attention(model, SLICINGS["rows"])
    assert (list(model.named_modules()), list(model.state_dict()), list(map(id, model.parameters()))) == before


def test_a_second_swap_changes_the_settings_of_the_same_processors(model: Any) -> None:
    swap_attention(model, SLICINGS["rows"])
    processors = model.attn_processors
    swap_attention(model, {"steps": 3})
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert {processor.slicing for processor in processors.values()} == {SliceConfig(steps=3)}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_swapped_model_is_a_model_of_its_own(model: nn.Module, duplicate: Any) -> None:
    swap_attention(model, SLICINGS["rows"])
    given = inputs()
    expected = results(model, given)
    other = duplicate(model)
    assert torch.equal(results(other, given)[0], expected[0])
    assert restore_attention(other) == LAYERS
    assert_same(results(other, given), expected)
    assert all(isinstance(found, SlicemodAttnProcessor) for found in model.attn_processors.values())  # type: ignore[operator]


def test_filter_fn_sees_paths_of_diffusers(model: nn.Module) -> None:
    report = swap_attention(model, SLICINGS["rows"], filter_fn=lambda name, module: "mid_block" in name)
    assert [layer.name for layer in report.layers] == [
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    ]
    assert len(report.skipped) == LAYERS - 2


def test_the_attention_of_an_autoencoder_computes_the_same() -> None:
    model: Any = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=3)
    x = torch.randn(2, 3, 8, 8)
    expected = model.encode(x).latent_dist.mean, model.decode(torch.ones(2, 3, 8, 8)).sample
    assert len(swap_attention(model, SLICINGS["rows"]).layers) == 2
    ours = model.encode(x).latent_dist.mean, model.decode(torch.ones(2, 3, 8, 8)).sample
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# The options of a diffusers Attention, each against the processor that it comes with.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, other scale": {"bias": False, "scale_qk": False},
    "group norm": {"norm_num_groups": 4},
    "norm of the context": {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
    "norms of query and key": {"qk_norm": "layer_norm"},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.7},
}


def attention(options: dict[str, Any]) -> Any:
    return Attention(query_dim=24, heads=3, dim_head=8, **options).eval()


@every_slicing
@pytest.mark.parametrize("image", [False, True], ids=["tokens", "image"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_of_a_layer_is_that_of_its_own_processor(name: str, image: bool, slicing: dict[str, Any]) -> None:
    layer = attention(OPTIONS[name])
    x = torch.randn(2, 24, 7, 9) if image else torch.randn(2, 61, 24)
    context = torch.randn(2, 5, 24) if "cross_attention_dim" in OPTIONS[name] else None
    expected = layer(x, context)
    swap_attention(nn.Sequential(layer), slicing)
    torch.testing.assert_close(layer(x, context), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 53), (2, 1, 53), (2, 61, 53), (6, 1, 53)], ids=str)
def test_an_additive_mask_is_that_of_attn_processor_2_0(sizes: tuple[int, ...]) -> None:
    layer = attention({"cross_attention_dim": 24})
    x, context = torch.randn(2, 61, 24), torch.randn(2, 53, 24)
    mask = torch.zeros(sizes).masked_fill(torch.rand(sizes) > 0.6, -math.inf)
    layer.set_processor(AttnProcessor2_0())
    expected = layer(x, context, attention_mask=mask)
    layer.set_processor(SlicemodAttnProcessor(SLICINGS["rows"]))
    torch.testing.assert_close(layer(x, context, attention_mask=mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(2)], ids=lambda p: type(p).__name__
)
def test_plain_processors_are_swapped_and_given_back(processor: Any) -> None:
    layer = attention({})
    layer.set_processor(processor)
    model = nn.Sequential(layer)
    assert len(swap_attention(model).layers) == 1
    restore_attention(model)
    assert layer.processor is processor


class WatermarkProcessor:
    """A processor that nobody knows."""

    def __call__(self, attn: Any, hidden_states: Tensor, **more: Any) -> Tensor:
        return hidden_states


class WatermarkModule(nn.Module):
    """The same as a module, as LoRA and IP-Adapter processors are."""

    def forward(self, attn: Any, hidden_states: Tensor, **more: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    "processor",
    [WatermarkProcessor(), WatermarkModule(), AttnAddedKVProcessor2_0()],
    ids=lambda p: type(p).__name__,
)
def test_a_processor_that_does_more_is_left_alone_and_named(processor: Any) -> None:
    special, plain = attention({}), attention({})
    special.set_processor(processor)
    with pytest.warns(UserWarning, match=f"0: its processor {type(processor).__name__} computes"):
        report = swap_attention(nn.Sequential(special, plain))
    assert [layer.name for layer in report.layers] == ["1"]
    assert special.processor is processor
    assert report.skipped == (
        ("0", f"its processor {type(processor).__name__} computes something else than plain attention"),
    )


def test_a_layer_with_added_projections_keeps_a_processor_that_ignores_them() -> None:
    special = attention({"added_kv_proj_dim": 5, "norm_num_groups": 4})
    special.set_processor(AttnProcessor2_0())
    with pytest.warns(UserWarning, match="swapped in part: 1 attention layers were, 1 were left"):
        report = swap_attention(nn.Sequential(special, attention({})))
    reason = "its processor AttnProcessor2_0 computes something else than plain attention with added projections"
    assert report.skipped == (("0", reason),)


def test_a_mask_is_not_repeated_for_every_head() -> None:
    layer = attention({})
    layer.set_processor(SlicemodAttnProcessor({"kernel": "math", "budget": "200KiB", "policy": "exact"}))
    x, mask = torch.randn(1, 509, 24), torch.randn(1, 509, 509)
    with torch.no_grad():
        layer(x, attention_mask=mask)
        peak = peak_memory(lambda: layer(x, attention_mask=mask))
    assert peak < mask.numel() * mask.element_size()


def test_repr_shows_settings_and_once_called_the_plan() -> None:
    processor = SlicemodAttnProcessor(SLICINGS["rows"])
    assert repr(processor) == "SlicemodAttnProcessor(budget='auto', policy='exact', kernel='math', steps=7)"
    layer = attention({})
    layer.set_processor(processor)
    layer(torch.randn(2, 61, 24))
    assert "plan: math, 7 x 9 rows," in repr(processor)


def test_a_processor_that_was_set_by_hand_is_not_restored() -> None:
    layer = attention({})
    layer.set_processor(SlicemodAttnProcessor(SLICINGS["rows"]))
    assert restore_attention(nn.Sequential(layer)) == 0
    assert isinstance(layer.processor, SlicemodAttnProcessor)


def test_a_compiled_layer_computes_the_same() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(attention(OPTIONS["group norm"]))
    swap_attention(model, SLICINGS["rows"])
    x = torch.randn(2, 61, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
