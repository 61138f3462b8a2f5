"""Layers of unknown classes: what is taken for attention, and that filter_fn has to choose it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

MATH = {"kernel": "math", "steps": 7}


class PoseAttention(nn.Module):
    """The parts and the call of CrossAttention: biases, a scale and an output projection of its own."""

    def __init__(self, *, heads: int = 3, dim_head: int = 11, **changed: nn.Module) -> None:
        super().__init__()
        self.heads, self.scale = heads, 0.7 / math.sqrt(dim_head)
        self.to_q = nn.Linear(29, heads * dim_head)
        self.to_k, self.to_v = nn.Linear(23, heads * dim_head), nn.Linear(23, heads * dim_head)
        self.to_out = nn.Linear(heads * dim_head, 29)
        for name, module in changed.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scores = self.scale * query @ key.mT  # (B, H, N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        return self.project_out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def project_out(self, output: Tensor) -> Tensor:
        projected: Tensor = self.to_out(output)
        return projected


class RenamedArguments(PoseAttention):
    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, context)


class MoreArguments(PoseAttention):
    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, bias: float = 0.0) -> Tensor:
        return super().forward(x, context, mask) + bias


class ComfyAttention(PoseAttention):
    """Called as ComfyUI's, which has a function of its own for attention, and gives it the options."""

    def forward(self, x: Tensor, context: Tensor, value: Tensor, transformer_options: Any) -> Tensor:  # type: ignore[override]
        raise NotImplementedError


class ListedOutput(PoseAttention):
    """Whose `to_out` is a list."""

    def __init__(self) -> None:
        super().__init__(to_out=nn.ModuleList([nn.Linear(33, 19), nn.Linear(19, 29)]))

    def project_out(self, output: Tensor) -> Tensor:
        for part in self.to_out.children():
            output = part(output)
        return output


def chosen(name: str, module: nn.Module) -> bool:
    return True


def results(layer: nn.Module, x: Tensor, context: Tensor, mask: Tensor) -> list[Tensor]:
    outputs = [layer(x, context), layer(x, context=context, mask=mask)]
    loss = torch.cat(outputs).square().sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, list(layer.parameters()))]


def test_a_chosen_lookalike_computes_the_same_and_comes_back() -> None:
    model = nn.ModuleDict({"pose": PoseAttention()})
    original, keys = model["pose"], list(model.state_dict())
    given = torch.randn(2, 61, 29), torch.randn(2, 53, 23), torch.rand(2, 53) > 0.4
    expected = results(model["pose"], *given)
    report = swap_attention(model, MATH, filter_fn=lambda name, module: isinstance(module, PoseAttention))
    assert [(layer.name, layer.host) for layer in report.layers] == [("pose", "lookalikes")]
    assert isinstance(model["pose"], MemoryAwareCrossAttention)
    assert list(model.state_dict()) == keys
    assert_same(results(model["pose"], *given), expected)
    assert restore_attention(model) == 1
    assert model["pose"] is original
    assert all(map(torch.equal, results(model["pose"], *given), expected))


def test_the_parts_of_a_list_of_output_projections_are_called_one_after_the_other() -> None:
    model = nn.ModuleDict({"pose": with_random_weights(ListedOutput())})
    given = torch.randn(2, 61, 29), torch.randn(2, 53, 23), torch.rand(2, 53) > 0.4
    expected = results(model["pose"], *given)
    swap_attention(model, MATH, filter_fn=chosen)
    assert isinstance(model["pose"], MemoryAwareCrossAttention)
    assert_same(results(model["pose"], *given), expected)


def test_without_filter_fn_a_lookalike_is_named_and_left_alone() -> None:
    model = nn.ModuleDict({"pose": PoseAttention()})
    with pytest.raises(ValueError, match="pose: PoseAttention only looks like attention; choose it with filter_fn"):
        swap_attention(model, MATH)
    assert type(model["pose"]) is PoseAttention


def test_a_second_swap_without_filter_fn_still_finds_it() -> None:
    model = nn.ModuleDict({"pose": PoseAttention()})
    swap_attention(model, MATH, filter_fn=chosen)
    swapped = model["pose"]
    assert len(swap_attention(model, {"steps": 5}).layers) == 1
    assert model["pose"] is swapped
    assert vars(swapped)["slicing"].steps == 5


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (RenamedArguments(), r"its forward takes \(hidden_states, context\) instead of \(x, context, mask, "),
        (MoreArguments(), r"its forward takes \(x, context, mask, bias\) instead of"),
        (PoseAttention(q_norm=nn.LayerNorm(33)), "it holds q_norm besides to_q, to_k, to_v, to_out"),
        (PoseAttention(to_q=nn.Linear(29, 31)), "give 31, 33 and 33 channels, which 3 heads cannot share"),
        (PoseAttention(to_v=nn.Linear(23, 31)), "give 33, 33 and 31 channels, which 3 heads cannot share"),
        (PoseAttention(to_v=nn.Linear(19, 33)), "its to_k takes 23 channels and its to_v 19"),
        (PoseAttention(to_k=nn.Conv1d(23, 33, 1)), "its to_k is a Conv1d, not a linear layer"),
        (PoseAttention(to_out=nn.ModuleDict({"0": nn.Linear(33, 29)})), "its to_out is a ModuleDict"),
        (ComfyAttention(), "value, transformer_options.* by `slicemod install`"),
    ],
    ids=["names", "more arguments", "norm", "query", "value", "context", "conv", "dict", "ComfyUI"],
)
def test_what_is_called_or_shaped_otherwise_is_refused_with_the_reason(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=reason):
        swap_attention(model, MATH, filter_fn=chosen)
    assert model[0] is layer


def test_a_forward_that_was_put_on_the_object_is_not_lost() -> None:
    layer = PoseAttention()
    forward = layer.forward
    layer.forward = lambda x, context: 2 * forward(x, context)  # type: ignore[method-assign, assignment, misc]
    with pytest.raises(ValueError, match="its forward was replaced on the object itself"):
        swap_attention(nn.Sequential(layer), filter_fn=chosen)


@pytest.mark.parametrize("missing", ["to_q", "to_out", "heads"])
def test_a_module_without_one_of_the_parts_is_no_lookalike(missing: str) -> None:
    layer = PoseAttention()
    delattr(layer, missing)
    with pytest.raises(ValueError, match="found none"):
        swap_attention(nn.Sequential(layer), filter_fn=chosen)
