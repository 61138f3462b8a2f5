"""A layer built, called and switched as the CrossAttention of sd-scripts, swapped and restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.adapters.known_code import KNOWN, digest, forward_methods
from slicemod.plan import SlicePlan
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

MATH: dict[str, Any] = {"kernel": "math", "steps": 7}


class CrossAttention(nn.Module):
    """A stand-in with the arguments, parts and switches of sd-scripts' own."""

    def __init__(self, query_dim: int, cross_attention_dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(cross_attention_dim, inner, bias=False)
        self.to_v = nn.Linear(cross_attention_dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])
        self.use_sdpa = False
        self.use_memory_efficient_attention = (False, False)
        self.processor: Any = None

    def set_use_memory_efficient_attention(self, xformers: bool, mem_eff: bool) -> None:
        self.use_memory_efficient_attention = xformers, mem_eff

    def set_use_sdpa(self, sdpa: bool) -> None:
        self.use_sdpa = sdpa

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if self.processor is not None:
            processed: Tensor = self.processor(attn=self, hidden_states=hidden_states, context=context, **kwargs)
            return processed
        context = hidden_states if context is None else context
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(hidden_states), self.to_k(context), self.to_v(context))
        )
        if self.use_sdpa:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            output = (self.scale * query @ key.mT).softmax(-1) @ value
        projected: Tensor = self.to_out[0](output.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Two layers, called as sd-scripts' blocks call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(26, 26, 2, 13), CrossAttention(26, 23, 2, 13)

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        hidden_states = self.attn1(hidden_states) + hidden_states
        output: Tensor = self.attn2(hidden_states, context=context) + hidden_states
        return output


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Block:
    """Whose code counts as known."""
    code = digest(tuple(forward_methods(CrossAttention).values()))
    assert code is not None
    monkeypatch.setitem(KNOWN, code, "a stand-in for sd-scripts")
    return with_random_weights(Block())


def results(block: Block) -> list[Tensor]:
    made = torch.Generator().manual_seed(3)
    output = block(torch.randn(2, 61, 26, generator=made), torch.randn(2, 53, 23, generator=made))
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(block.parameters()))]


@pytest.mark.parametrize("sdpa", [False, True])
def test_a_block_of_sd_scripts_computes_the_same_and_comes_back(sdpa: bool, block: Block) -> None:
    layers = [block.attn1, block.attn2]
    for layer in layers:
        layer.set_use_sdpa(sdpa)
    expected, keys = results(block), list(block.state_dict())
    report = swap_attention(block, MATH)
    assert [(layer.name, layer.host, layer.replaced) for layer in report.layers] == [
        ("attn1", "sd-scripts", "CrossAttention"),
        ("attn2", "sd-scripts", "CrossAttention"),
    ]
    assert list(block.state_dict()) == keys
    assert_same(results(block), expected)
    assert all(isinstance(layer.plan, SlicePlan) and layer.plan.steps == 7 for layer in report.layers)
    assert restore_attention(block) == 2
    assert [block.attn1, block.attn2] == layers
    assert all(map(torch.equal, results(block), expected))


def test_switches_thrown_after_the_swap_reach_the_original(block: Block) -> None:
    swap_attention(block, MATH)
    block.attn1.set_use_sdpa(True)
    block.attn1.set_use_memory_efficient_attention(True, False)
    restore_attention(block)
    assert (block.attn1.use_sdpa, block.attn1.use_memory_efficient_attention) == (True, (True, False))


def test_the_input_may_be_given_by_its_name(block: Block) -> None:
    hidden = torch.randn(2, 61, 26)
    expected = block.attn1(hidden_states=hidden)
    swap_attention(block, MATH)
    torch.testing.assert_close(block.attn1(hidden_states=hidden), expected)


def test_a_mask_is_refused_because_its_meaning_depends_on_switches(block: Block) -> None:
    swap_attention(block, MATH)
    with pytest.raises(ValueError, match=r"mask: expected None, .*got sizes \(61, 61\)"):
        block.attn1(torch.randn(2, 61, 26), mask=torch.ones(61, 61, dtype=torch.bool))


def test_a_layer_with_a_processor_is_left_alone(block: Block) -> None:
    block.attn1.processor = lambda attn, hidden_states, **more: 2 * hidden_states
    with pytest.warns(UserWarning, match="attn1: its processor function computes its attention"):
        report = swap_attention(block, MATH)
    assert [layer.name for layer in report.layers] == ["attn2"]


def test_the_same_parts_with_unknown_code_have_to_be_chosen() -> None:
    block = with_random_weights(Block())
    expected = results(block)
    with pytest.raises(ValueError, match="attn1: its class CrossAttention has a forward that slicemod does not know"):
        swap_attention(block, MATH)
    assert len(swap_attention(block, MATH, filter_fn=lambda name, module: True).layers) == 2
    assert_same(results(block), expected)
