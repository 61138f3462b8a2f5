"""A diffusers UNet with IP-Adapters, whose attention to text and image prompts is sliced."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0
from torch import Tensor

from slicemod.adapters.diffusers import SlicemodAttnProcessor
from slicemod.config import SliceConfig
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "rows": {"kernel": "math", "steps": 7},
    "exact": {"kernel": "math", "budget": "64KiB", "policy": "exact"},
}
every_slicing = pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS.keys())
LAYERS = 8
WIDTH, IMAGE_WIDTH = 24, 13


def adapter_weights(model: Any) -> dict[str, Any]:
    """An IP-Adapter's checkpoint for this UNet, with random weights; its layers have odd numbers."""
    weights = {}
    cross = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(cross):
        channels = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights[f"{2 * number + 1}.to_k_ip.weight"] = torch.randn(channels, WIDTH) / 5
        weights[f"{2 * number + 1}.to_v_ip.weight"] = torch.randn(channels, WIDTH) / 5
    projection = {
        "proj.weight": torch.randn(4 * WIDTH, IMAGE_WIDTH) / 4,
        "proj.bias": torch.randn(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def unet(adapters: int = 1) -> Any:
    model: Any = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    )
    with_random_weights(model)
    model._load_ip_adapter_weights([adapter_weights(model) for _ in range(adapters)], low_cpu_mem_usage=False)
    return model


def results(model: Any, images: list[Tensor], masks: list[Tensor | None] | None = None) -> list[Tensor]:
    """The output, and the gradients of the parameters it depends on."""
    seeded = torch.Generator().manual_seed(1)
    output = model(
        torch.randn(2, 3, 8, 8, generator=seeded),
        torch.tensor([3, 500]),
        torch.randn(2, 5, WIDTH, generator=seeded),
        added_cond_kwargs={"image_embeds": images},
        cross_attention_kwargs=None if masks is None else {"ip_adapter_masks": masks},
    ).sample
    grads = torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


def image_processors(model: Any) -> list[Any]:
    return [each for each in model.attn_processors.values() if hasattr(each, "to_k_ip")]


def set_scale(model: Any, scale: list[Any]) -> None:
    for processor in image_processors(model):
        processor.scale = list(scale)


def images(*counts: int) -> list[Tensor]:
    return [torch.randn(2, count, IMAGE_WIDTH) for count in counts]


def half(top: bool) -> Tensor:
    mask = torch.zeros(16, 16)
    mask[: 8 if top else 16, 0 if top else 8 :] = 1
    return mask


CASES: dict[str, tuple[int, list[int], list[Any], list[list[bool] | None] | None]] = {
    # adapters, images for each, scales, masks
    "one image": (1, [1], [0.7], None),
    "three images": (1, [3], [0.7], None),
    "two adapters": (2, [1, 2], [0.7, 0.4], None),
    "one of them off": (2, [1, 2], [0.0, 0.4], None),
    "masks": (1, [2], [0.7], [[True, False]]),
    "masks with scales of their own": (1, [2], [[0.7, 0.2]], [[True, False]]),
    "masks with scales of zero": (1, [2], [[0.0, 0.0]], [[True, False]]),
    "a mask for one adapter": (2, [1, 1], [0.7, 0.4], [None, [True]]),
}


@every_slicing
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_swapped_unet_sees_the_same_images(case: Any, slicing: dict[str, Any]) -> None:
    adapters, counts, scale, halves = case
    model, prompts = unet(adapters), images(*counts)
    set_scale(model, scale)
    masks = halves and [each and torch.stack([half(top) for top in each])[None] for each in halves]
    expected = results(model, prompts, masks)
    with swap_attention(model, slicing) as report:
        assert len(report.layers) == LAYERS
        assert report.skipped == ()
        assert {layer.replaced for layer in report.layers} == {"AttnProcessor2_0", "IPAdapterAttnProcessor2_0"}
        assert_same(results(model, prompts, masks), expected)
        assert all(layer.plan is not None for layer in report.layers)
    assert all(map(torch.equal, results(model, prompts, masks), expected))


def test_image_prompts_matter() -> None:
    """Or the comparisons above would compare nothing."""
    model = unet()
    swap_attention(model, SLICINGS["rows"])
    one, other = results(model, images(1))[0], results(model, images(1))[0]
    assert not torch.allclose(one, other, rtol=1e-2, atol=1e-3)


def test_processors_weights_and_keys_are_the_same_objects() -> None:
    model = unet()
    before = (model.attn_processors, list(model.state_dict()), list(map(id, model.parameters())))
    ours = [name for name, processor in before[0].items() if hasattr(processor, "to_k_ip")]
    assert len(ours) == LAYERS // 2
    swap_attention(model, SLICINGS["rows"])
    assert [model.attn_processors[name] is before[0][name] for name in ours] == [True] * len(ours)
    assert (list(model.state_dict()), list(map(id, model.parameters()))) == before[1:]
    restore_attention(model)
    assert all(model.attn_processors[name] is processor for name, processor in before[0].items())
    assert {type(processor) for processor in image_processors(model)} == {IPAdapterAttnProcessor2_0}
    assert all("slicing" not in vars(processor) for processor in image_processors(model))


def test_diffusers_still_finds_the_processors_to_set_scales_on() -> None:
    """Its loaders look for the class."""
    model = unet()
    swap_attention(model, SLICINGS["rows"])
    assert all(isinstance(processor, IPAdapterAttnProcessor2_0) for processor in image_processors(model))
    prompts = images(1)
    seen = results(model, prompts)[0]
    set_scale(model, [0.0])
    unseen = results(model, prompts)[0]
    assert not torch.allclose(seen, unseen)
    restore_attention(model)
    torch.testing.assert_close(results(model, prompts)[0], unseen)


def test_the_older_processor_is_swapped_too() -> None:
    model, prompts = unet(), images(1)
    for name, processor in model.attn_processors.items():
        if hasattr(processor, "to_k_ip"):
            layer = model.get_submodule(name.removesuffix(".processor"))
            older = IPAdapterAttnProcessor(processor.hidden_size, WIDTH, num_tokens=(4,), scale=0.7)
            older.load_state_dict(processor.state_dict())
            layer.set_processor(older)
    expected = results(model, prompts)
    swap_attention(model, SLICINGS["rows"])
    assert_same(results(model, prompts), expected)
    restore_attention(model)
    assert {type(processor) for processor in image_processors(model)} == {IPAdapterAttnProcessor}


def test_a_second_swap_changes_the_settings_of_all() -> None:
    model = unet()
    swap_attention(model, SLICINGS["rows"])
    report = swap_attention(model, {"steps": 5})
    assert len(report.layers) == LAYERS
    assert {processor.slicing.steps for processor in model.attn_processors.values()} == {5}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_swapped_unet_is_restored_on_its_own(duplicate: Any) -> None:
    model, prompts = unet(), images(1)
    swap_attention(model, SLICINGS["rows"])
    expected = results(model, prompts)
    other = duplicate(model)
    assert all(map(torch.equal, results(other, prompts), expected))
    assert restore_attention(other) == LAYERS
    assert_same(results(other, prompts), expected)
    assert all(isinstance(processor, SlicemodAttnProcessor) for processor in model.attn_processors.values())


def test_an_adapter_loaded_into_a_swapped_unet_is_sliced_after_another_swap() -> None:
    model = unet()
    swap_attention(model, SLICINGS["rows"])
    model._load_ip_adapter_weights([adapter_weights(model)], low_cpu_mem_usage=False)
    prompts = images(1)
    expected = results(model, prompts)
    assert len(swap_attention(model, SLICINGS["rows"]).layers) == LAYERS
    assert_same(results(model, prompts), expected)
    assert all(isinstance(processor, SlicemodAttnProcessor) for processor in model.attn_processors.values())


def test_processors_that_diffusers_makes_anew_go_back_to_what_their_layers_had() -> None:
    """To load and to unload an IP-Adapter it makes the other layers' processors again, by their class alone."""
    model = unet()
    before = {name: each for name, each in model.attn_processors.items() if name.endswith("attn1.processor")}
    swap_attention(model, SLICINGS["rows"])
    model._load_ip_adapter_weights([adapter_weights(model)], low_cpu_mem_usage=False)
    IPAdapterMixin.unload_ip_adapter(SimpleNamespace(unet=model))
    made = model.attn_processors
    assert all(isinstance(made[name], SlicemodAttnProcessor) and not made[name].replaced for name in before)
    swap_attention(model, SLICINGS["rows"])
    assert {made[name].slicing for name in before} == {SliceConfig(**SLICINGS["rows"])}
    assert restore_attention(model) == LAYERS
    assert all(model.attn_processors[name] is processor for name, processor in before.items())
    swap_attention(model, SLICINGS["rows"])
    assert restore_attention(copy.deepcopy(model)) == LAYERS


def layer_of(model: Any) -> tuple[Any, Any]:
    """A layer with an IP-Adapter, and its processor."""
    name = next(name for name, processor in model.attn_processors.items() if hasattr(processor, "to_k_ip"))
    layer = model.get_submodule(name.removesuffix(".processor"))
    return layer, layer.processor


@pytest.mark.filterwarnings("ignore:You have passed a tensor as `encoder_hidden_states`:FutureWarning")
def test_image_tokens_may_follow_the_text_in_one_tensor() -> None:
    model = unet()
    layer, _ = layer_of(model)
    x, both = torch.randn(2, 61, 16), torch.randn(2, 5 + 4, WIDTH)
    expected = layer(x, both)
    swap_attention(model, SLICINGS["rows"])
    torch.testing.assert_close(layer(x, both), expected, rtol=1e-4, atol=1e-5)


def test_no_image_prompts_or_masks_that_are_not_theirs_are_errors() -> None:
    model = unet()
    swap_attention(model, SLICINGS["rows"])
    layer, _ = layer_of(model)
    x, text, tokens = torch.randn(2, 61, 16), torch.randn(2, 5, WIDTH), torch.randn(2, 2, 4, WIDTH)
    with pytest.raises(ValueError, match="encoder_hidden_states: expected text and image prompts"):
        layer(x)
    with pytest.raises(ValueError, match="ip_adapter_masks: expected one for each of 1 adapters; got 2 masks and 1"):
        layer(x, (text, [tokens]), ip_adapter_masks=[None, None])
    with pytest.raises(ValueError, match=r"got \(1, 3, 16, 16\), 2 images and 2 scales"):
        layer(x, (text, [tokens]), ip_adapter_masks=[torch.ones(1, 3, 16, 16)])
