"""Plans of feed-forwards: what they promise is what is held, and they take no more than helps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from ldm.modules.attention import FeedForward as LDMFeedForward
from torch import nn

from slicemod.bench.memory import peak_memory
from slicemod.feed_forward.layer import SlicedFeedForward
from slicemod.feed_forward.plan import FeedForwardShape, plan_feed_forward
from slicemod.plan import NotEnoughMemoryError

SHAPE = FeedForwardShape(tokens=16381, channels=320, inner=1280, out=320, itemsize=2, held=4)
ACTIVATIONS = ["geglu", "geglu-approximate", "gelu", "gelu-approximate", "linear-silu", "swiglu"]
LAYERS: dict[str, Any] = {
    **{name: lambda name=name: FeedForward(61, mult=8, activation_fn=name) for name in ACTIVATIONS},
    "LDM": lambda: LDMFeedForward(61, mult=8),
    "LDM gated": lambda: LDMFeedForward(61, mult=8, glu=True),
}


def test_chunks_have_about_the_same_size_and_fit_the_budget() -> None:
    plan = plan_feed_forward(SHAPE, 2**22)
    assert plan.peak_bytes <= 2**22 < SHAPE.peak_bytes(plan.tokens * plan.steps // (plan.steps - 1))
    assert (plan.steps - 1) * plan.tokens < SHAPE.tokens <= plan.steps * plan.tokens


def test_no_more_is_taken_than_runs_at_full_speed() -> None:
    assert plan_feed_forward(SHAPE, 2**40) == plan_feed_forward(SHAPE, 2**26)
    assert plan_feed_forward(SHAPE, 2**40).tokens < plan_feed_forward(SHAPE, 2**40, "cuda").tokens


def test_few_tokens_are_computed_at_once() -> None:
    plan = plan_feed_forward(replace(SHAPE, tokens=77), 2**30)
    assert (plan.tokens, plan.steps) == (77, 1)


def test_a_budget_for_one_token_is_enough_and_one_byte_less_is_not() -> None:
    need = SHAPE.peak_bytes(1)
    assert plan_feed_forward(SHAPE, need).tokens == 1
    with pytest.raises(NotEnoughMemoryError, match=r"feed-forward: needs .* for 16381 tokens of 320 channels"):
        plan_feed_forward(SHAPE, need - 1)


def test_without_checkpoints_all_that_is_kept_has_to_fit() -> None:
    kept = replace(SHAPE, training=True, checkpoint=False)
    assert plan_feed_forward(kept, kept.peak_bytes(kept.tokens)).steps == 1
    with pytest.raises(NotEnoughMemoryError, match="Set checkpoint=True"):
        plan_feed_forward(kept, kept.peak_bytes(kept.tokens) - 1)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_the_peak_is_what_was_promised(make: Any, dtype: torch.dtype, training: bool) -> None:
    layer = SlicedFeedForward(make().to(dtype).net, {"budget": "3MiB"})
    x = torch.randn(3, 1009, 61, dtype=dtype).requires_grad_(training)
    wanted = [x, *layer.parameters()] if training else []

    def step() -> Any:
        output = layer(x)
        return torch.autograd.grad(output, wanted, torch.ones_like(output)) if training else output

    with torch.set_grad_enabled(training):
        step()
        assert layer.plan is not None
        assert layer.plan.steps > 1
        beside = 2 * x.nbytes + sum(part.nbytes for part in wanted) if training else x.nbytes
        peak = peak_memory(step) - beside
    assert peak <= layer.plan.peak_bytes <= 3 * 2**20
    assert peak >= (0.6 if training else 0.95) * layer.plan.peak_bytes


def test_projections_that_are_wrapped_count_their_update() -> None:
    class Updated(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.base(x) + 0.3 * self.base(x)
            return output

    layer = SlicedFeedForward(FeedForward(61, mult=8, activation_fn="geglu").net, {"budget": "3MiB"})
    activation: Any = layer.net[0]
    activation.proj = Updated(activation.proj)
    x = torch.randn(3, 1009, 61)
    with torch.no_grad():
        layer(x)
        peak = peak_memory(lambda: layer(x)) - x.nbytes
    assert layer.plan is not None
    assert 0.95 * layer.plan.peak_bytes <= peak <= layer.plan.peak_bytes + 64  # and a scalar
