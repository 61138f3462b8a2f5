"""A small LDM UNet, with the original CompVis code, swapped and restored."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from ldm.modules.attention import CrossAttention, MemoryEfficientCrossAttention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config
from torch import Tensor, nn

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.config import SliceConfig
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "rows": {"kernel": "math", "steps": 7},
    "exact": {"kernel": "math", "budget": "64KiB", "policy": "exact"},
}
every_slicing = pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS.keys())


pytestmark = pytest.mark.usefixtures("omegaconf")


UNET: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (1, 2),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "context_dim": 23,
    "legacy": False,
}


def unet(**changed: Any) -> nn.Module:
    """The original starts with zeros in the last layer of each block."""
    model: nn.Module = UNetModel(**{**UNET, **changed})
    return with_random_weights(model)


@pytest.fixture
def model(omegaconf: None) -> nn.Module:
    return unet()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.tensor([3, 500])[:batch], torch.randn(batch, 5, 23)


def results(model: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The output, and the gradients of all parameters."""
    x, steps, context = given
    output = model(x, steps, context=context)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(model.parameters()))]


@every_slicing
def test_a_swapped_unet_computes_the_same_and_has_the_same_gradients(model: nn.Module, slicing: dict[str, Any]) -> None:
    given = inputs()
    expected = results(model, given)
    assert len(swap_attention(model, slicing).layers) == 14
    assert_same(results(model, given), expected)


def test_the_plans_of_all_layers_are_in_the_report(model: nn.Module) -> None:
    report = swap_attention(model, SLICINGS["rows"])
    model(*inputs()[:2], context=inputs()[2])
    assert report.attention_plans.keys() == {layer.name for layer in report.layers}
    assert all(plan.steps > 1 for plan in report.attention_plans.values())


def test_restored_outputs_are_bit_identical_and_modules_the_same_objects(model: nn.Module) -> None:
    given = inputs()
    expected, before = results(model, given), list(model.named_modules())
    swap_attention(model, SLICINGS["rows"])
    assert restore_attention(model) == 14
    assert list(model.named_modules()) == before
    for ours, theirs in zip(results(model, given), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_state_dict_keys_and_parameter_objects_stay(model: nn.Module) -> None:
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    swap_attention(model, SLICINGS["rows"])
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_a_checkpoint_of_either_loads_into_the_other(model: nn.Module) -> None:
    other = unet()
    swap_attention(other, SLICINGS["rows"])
    other.load_state_dict(model.state_dict())
    given = inputs()
    torch.testing.assert_close(results(other, given)[0], results(model, given)[0], rtol=1e-3, atol=1e-4)
    model.load_state_dict(other.state_dict())


def test_an_optimizer_made_before_the_swap_trains_the_swapped_model(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap_attention(model, SLICINGS["rows"])
    weight = model.get_parameter("middle_block.1.transformer_blocks.0.attn1.to_q.weight")
    before = weight.detach().clone()
    x, steps, context = inputs()
    model(x, steps, context=context).square().mean().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_training_mode_and_frozen_parameters_stay(model: nn.Module) -> None:
    attention = [module for module in model.modules() if isinstance(module, CrossAttention)]
    attention[0].eval()
    attention[1].requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, CrossAttention)]
    swap_attention(model, SLICINGS["rows"])
    assert [model.get_submodule(name).training for name in names] == [False, *[True] * 13]
    assert not any(parameter.requires_grad for parameter in model.get_submodule(names[1]).parameters())
    assert all(parameter.requires_grad for parameter in model.get_submodule(names[2]).parameters())


def test_the_mode_of_a_swapped_model_reaches_the_restored_one(model: nn.Module) -> None:
    swap_attention(model, SLICINGS["rows"])
    model.eval()
    restore_attention(model)
    assert not any(module.training for module in model.modules())


def test_hooks_on_a_layer_and_its_projections_still_run_and_can_be_removed(model: nn.Module) -> None:
    name = "middle_block.1.transformer_blocks.0.attn1"
    calls: list[str] = []
    layer = model.get_submodule(name)
    handles = [
        layer.register_forward_hook(lambda module, given, output: calls.append("layer")),
        layer.register_forward_pre_hook(lambda module, given: calls.append("before")),
        layer.get_submodule("to_q").register_forward_hook(lambda module, given, output: calls.append("query")),
    ]
    swap_attention(model, SLICINGS["rows"])
    x, steps, context = inputs()
    model(x, steps, context=context)
    assert calls == ["before", "query", "layer"]
    for handle in handles:
        handle.remove()
    model(x, steps, context=context)
    assert len(calls) == 3


# LDM's own checkpointing uses autocast functions that have new names since.
@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
@every_slicing
def test_the_hosts_own_checkpointing_works(slicing: dict[str, Any]) -> None:
    model, given = unet(use_checkpoint=True), inputs()
    expected = results(model, given)
    swap_attention(model, slicing)
    assert_same(results(model, given), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_swapped_model_is_a_model_of_its_own(model: nn.Module, duplicate: Any) -> None:
    swap_attention(model, SLICINGS["rows"])
    given = inputs()
    expected = results(model, given)[0]
    other = duplicate(model)
    torch.testing.assert_close(results(other, given)[0], expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(results(model, given)[0], expected)
    assert restore_attention(other) == 14
    restored = other.get_submodule("middle_block.1.transformer_blocks.0.attn1")
    assert isinstance(restored, CrossAttention)
    assert all((parameter == 0).all() for parameter in restored.parameters())
    assert isinstance(model.get_submodule("middle_block.1.transformer_blocks.0.attn1"), MemoryAwareCrossAttention)


def test_xformers_layers_are_swapped_and_need_no_xformers_then(capsys: pytest.CaptureFixture[str]) -> None:
    plain = CrossAttention(29, 23, heads=3, dim_head=11)
    model = nn.Sequential(MemoryEfficientCrossAttention(29, 23, heads=3, dim_head=11))
    capsys.readouterr()  # LDM prints what it builds
    model[0].load_state_dict(plain.state_dict())
    swap_attention(model, SLICINGS["rows"])
    x, context = torch.randn(2, 61, 29), torch.randn(2, 53, 23)
    torch.testing.assert_close(model[0](x, context=context), plain(x, context))


def test_dropout_of_the_host_is_kept() -> None:
    model = nn.Sequential(CrossAttention(32, dropout=0.5))
    swap_attention(model, SLICINGS["rows"])
    assert abs(float((model(torch.randn(2, 61, 32)) == 0).double().mean()) - 0.5) < 0.05


def test_moving_a_swapped_model_moves_the_original_too() -> None:
    model = nn.Sequential(CrossAttention(32))
    swap_attention(model, SLICINGS["rows"])
    model.double()
    restore_attention(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


class _Lookalike(nn.Module):
    """CompVis's projections, with another scale, under its class name."""

    def __init__(self, scale: float, **more: nn.Module) -> None:
        super().__init__()
        self.heads, self.scale = 2, scale
        self.to_q, self.to_k, self.to_v = (nn.Linear(26, 26, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(26, 26), nn.Dropout(0.0))
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (2, 13)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
        )
        weights = (self.scale * query @ key.transpose(-1, -2)).softmax(-1)
        output: Tensor = self.to_out((weights @ value).transpose(1, 2).flatten(2))
        return output


_Lookalike.__name__ = "CrossAttention"


def chosen(name: str, module: nn.Module) -> bool:
    return True


def test_a_layers_own_scale_is_kept() -> None:
    model, x = nn.ModuleDict({"attn": _Lookalike(scale=1.0)}), torch.randn(2, 7, 26)
    wanted = model["attn"](x)
    swap_attention(model, {"kernel": "math"}, filter_fn=chosen)
    torch.testing.assert_close(model["attn"](x), wanted)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"q_norm": nn.LayerNorm(26)}, "it holds q_norm besides to_q, to_k, to_v, to_out"),
        ({"to_k": nn.Sequential(nn.Linear(26, 26))}, "its to_k is a Sequential, not a linear layer"),
    ],
)
def test_a_layer_that_computes_something_else_is_left_alone(more: dict[str, nn.Module], reason: str) -> None:
    layer = _Lookalike(1.0, **more)
    model = nn.ModuleDict({"plain": _Lookalike(1.0), "other": layer})
    with pytest.warns(UserWarning, match=f"other: {reason}"):
        report = swap_attention(model, filter_fn=chosen)
    assert report.skipped == (("other", reason),)
    assert model["other"] is layer


# From the config: LDM's own `instantiate_from_config` resolves the block.

TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


def config(unet: Any, **more: Any) -> dict[str, Any]:
    return {"target": "slicemod.adapters.compvis.build", "params": {"unet": unet, **more}}


@pytest.mark.parametrize("mapping", [dict, types.MappingProxyType], ids=["dict", "any mapping"])
def test_a_unet_config_builds_the_same_unet_with_its_attention_swapped(mapping: Any) -> None:
    torch.manual_seed(3)
    plain = with_random_weights(instantiate_from_config({"target": TARGET, "params": UNET}))
    torch.manual_seed(3)
    unet = mapping({"target": TARGET, "params": mapping(UNET)})
    ours = with_random_weights(instantiate_from_config(config(unet, slicing=mapping(SLICINGS["rows"]))))
    assert type(ours) is type(plain)
    layer: Any = ours.get_submodule("middle_block.1.transformer_blocks.0.attn1")
    assert layer.slicing == SliceConfig(**SLICINGS["rows"])
    given = inputs()
    assert_same(results(ours, given), results(plain, given))
    ours.load_state_dict(plain.state_dict())


def test_a_unet_config_without_slicing_takes_the_default_one() -> None:
    ours = instantiate_from_config(config({"target": TARGET, "params": UNET}))
    layer: Any = ours.get_submodule("middle_block.1.transformer_blocks.0.attn1")
    assert layer.slicing == SliceConfig()


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"params": {}}, r"unet: expected a block with target and params, as unet_config had it; got \{'params'"),
        ("ldm.UNet", "unet: expected a block with target and params"),
        ({"target": "ldm.nowhere.UNet"}, r"unet.target: .*got 'ldm.nowhere.UNet': No module named 'ldm.nowhere'"),
        ({"target": "ldm.util.UNet"}, "unet.target: .*has no attribute 'UNet'"),
        ({"target": "UNet"}, "unet.target: expected the dotted name of a class that can be imported; got 'UNet'"),
        ({"target": "torch.nn.Identity"}, "found none in Identity"),
    ],
)
def test_a_config_that_builds_nothing_is_an_error_that_says_why(unet: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instantiate_from_config(config(unet))
