"""LoRA on the projections of swapped layers: by peft where it is installed, and by a wrapper of the same make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from ldm.modules.attention import BasicTransformerBlock
from torch import Tensor, nn

from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

MATH: dict[str, Any] = {"kernel": "math", "steps": 7}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LoRALinear(nn.Module):
    """A linear layer with an update of rank 3, as peft wraps one."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.Linear(self.in_features, 3, bias=False)
        self.lora_B = nn.Linear(3, self.out_features, bias=False)
        self.scaling = 0.6

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))
        return output


def add_lora(model: nn.Module, targets: tuple[str, ...] = TARGETS) -> None:
    for name, module in list(model.named_modules()):
        if name.endswith(targets) and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module))


def unet() -> Any:
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


def ldm_block() -> Any:
    return with_random_weights(nn.Sequential(BasicTransformerBlock(32, 2, 16, checkpoint=False)))


def call(model: Any, **more: Any) -> Tensor:
    seeded = torch.Generator().manual_seed(1)
    if isinstance(model, nn.Sequential):
        output: Tensor = model(torch.randn(2, 61, 32, generator=seeded))
        return output
    given = torch.randn(2, 3, 8, 8, generator=seeded), torch.tensor([3, 500]), torch.randn(2, 5, 23, generator=seeded)
    sample: Tensor = model(*given, **more).sample
    return sample


def results(model: nn.Module, **more: Any) -> list[Tensor]:
    """The output, and the gradients of the updates."""
    output = call(model, **more)
    updates = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert updates
    return [output.detach(), *torch.autograd.grad(output.square().sum(), updates)]


both = pytest.mark.parametrize("make", [unet, ldm_block], ids=["diffusers", "LDM"])


@both
def test_a_model_with_lora_computes_the_same_when_swapped(make: Any) -> None:
    model = make()
    plain = call(model)
    add_lora(model)
    expected = results(model)
    assert not torch.allclose(expected[0], plain, rtol=1e-2, atol=1e-3)
    with swap_attention(model, MATH):
        assert_same(results(model), expected)
    assert all(map(torch.equal, results(model), expected))


@both
def test_lora_may_come_after_the_swap_and_stays_after_it_is_undone(make: Any) -> None:
    model = make()
    swap_attention(model, MATH)
    add_lora(model)
    expected, keys = results(model), list(model.state_dict())
    restore_attention(model)
    assert_same(results(model), expected)
    assert list(model.state_dict()) == keys


@both
def test_pefts_lora_before_and_after_the_swap(make: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(TARGETS), init_lora_weights=False)
    for first in ("lora", "swap"):
        torch.manual_seed(3)
        model = make()
        if first == "swap":
            swap_attention(model, MATH)
        peft.inject_adapter_in_model(config, model)
        if first == "swap":
            restore_attention(model)
        expected = results(model)
        swap_attention(model, MATH)
        assert_same(results(model), expected)
        restore_attention(model)
        assert all(map(torch.equal, results(model), expected))


def test_the_scale_of_pefts_lora_is_that_of_cross_attention_kwargs() -> None:
    peft = pytest.importorskip("peft")
    model = unet()
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(TARGETS), init_lora_weights=False))
    scaled = {"cross_attention_kwargs": {"scale": 0.3}}
    expected, whole = results(model, **scaled), results(model)
    assert not torch.allclose(expected[0], whole[0], rtol=1e-2, atol=1e-3)
    swap_attention(model, MATH)
    assert_same(results(model, **scaled), expected)
    assert_same(results(model), whole)
