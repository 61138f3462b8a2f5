"""Feed-forwards in chunks: the same results, for any number of tokens, in training, compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor

from slicemod.bench.memory import peak_memory
from slicemod.feed_forward.layer import SlicedFeedForward
from slicemod.plan import NotEnoughMemoryError
from tests.feed_forward.test_plan import LAYERS
from tests.oracle import assert_same

SMALL = {"budget": "150KiB"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def last_of(layer: SlicedFeedForward) -> Any:
    """The last projection."""
    return layer.net[2]


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("sizes", [(2, 67, 61), (113, 61), (3, 5, 7, 61), (61,)], ids=str)
def test_output_and_gradients_are_those_of_the_whole(make: Any, sizes: tuple[int, ...]) -> None:
    whole, x = make(), torch.randn(sizes)
    layer = SlicedFeedForward(whole.net, {"budget": "120KiB"})
    with torch.no_grad():
        expected = whole(x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        assert layer(x).shape == expected.shape
    assert layer.plan is not None
    assert layer.plan.steps > 1 or len(sizes) == 1
    layer.slicing = SlicedFeedForward(whole.net, {"budget": "2MiB"}).slicing
    assert_same(results(layer, x), results(whole, x))
    assert layer.plan.checkpoint


def test_frozen_weights_still_give_the_inputs_gradient_in_chunks() -> None:
    whole = LAYERS["geglu"]().requires_grad_(False)
    layer, x = SlicedFeedForward(whole.net, {"budget": "220KiB"}), torch.randn(2, 67, 61, requires_grad=True)
    (ours,), (theirs,) = (torch.autograd.grad(each(x).square().sum(), [x]) for each in (layer, whole))
    assert layer.plan is not None
    assert layer.plan.steps > 2
    torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_those_of_the_whole() -> None:
    whole = LAYERS["geglu"]().double().requires_grad_(False)
    layer, x = SlicedFeedForward(whole.net, {"budget": "400KiB"}), torch.randn(2, 67, 61).double().requires_grad_()

    def second(each: Any) -> Tensor:
        (first,) = torch.autograd.grad(each(x).pow(3).sum(), [x], create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x])[0]

    ours = second(layer)
    assert layer.plan is not None
    assert layer.plan.steps > 2
    torch.testing.assert_close(ours, second(whole))


def test_the_backward_pass_drops_what_the_forward_pass_dropped() -> None:
    """The sum of the outputs is linear in the last bias and the last weight: the gradient tells what was dropped."""
    layer = SlicedFeedForward(FeedForward(61, dropout=0.5).net, {"budget": "1MiB"}).train()
    x, last = torch.randn(997, 61), last_of(layer)
    output = layer(x)
    assert layer.plan is not None
    assert layer.plan.steps > 2
    (gradient,) = torch.autograd.grad(output.sum(), [last.weight])
    with torch.no_grad():
        from_gradient = (gradient * last.weight).sum() + len(x) * last.bias.sum()
    torch.testing.assert_close(output.sum(), from_gradient, rtol=1e-4, atol=1e-2)


def test_no_activations_are_kept_between_the_passes() -> None:
    layer, x = SlicedFeedForward(FeedForward(61).net, {"budget": "3MiB"}), torch.randn(2003, 61, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert max(kept, default=0) <= x.nbytes


def test_checkpoint_false_keeps_the_activations_and_says_what_they_take() -> None:
    layer = SlicedFeedForward(FeedForward(61).net, {"checkpoint": False, "budget": "1GiB"})
    layer(torch.randn(2003, 61))
    assert layer.plan is not None
    assert not layer.plan.checkpoint
    assert layer.plan.steps == 1
    layer.slicing = SlicedFeedForward(layer.net, {"checkpoint": False, "budget": "2MiB"}).slicing
    with pytest.raises(NotEnoughMemoryError, match="Set checkpoint=True"):
        layer(torch.randn(2003, 61))


def test_no_tokens_give_no_output() -> None:
    assert SlicedFeedForward(FeedForward(61).net)(torch.randn(2, 0, 61)).shape == (2, 0, 61)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"])
def test_a_compiled_layer_is_one_graph_and_computes_the_same(make: Any, training: bool) -> None:
    whole, x = make(), torch.randn(2, 211, 61)
    layer = SlicedFeedForward(whole.net, {"budget": "2MiB"})
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        if training:
            assert_same(results(compiled, x), results(whole, x))
        else:
            torch.testing.assert_close(compiled(x), whole(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_without_biases_or_with_frozen_weights_computes_the_same() -> None:
    for whole in (FeedForward(61, bias=False), FeedForward(61).requires_grad_(False)):
        layer, x = SlicedFeedForward(whole.net, {"budget": "1MiB"}), torch.randn(2, 211, 61, requires_grad=True)
        compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
        wanted = [x, *(parameter for parameter in whole.parameters() if parameter.requires_grad)]
        ours, theirs = (torch.autograd.grad(each(x).square().sum(), wanted) for each in (compiled, whole))
        assert_same(list(ours), list(theirs))


def test_a_compiled_layer_with_dropout_drops_the_same_in_both_passes() -> None:
    layer = SlicedFeedForward(FeedForward(61, dropout=0.5).net, {"budget": "1MiB"}).train()
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, last = torch.randn(499, 61), last_of(layer)
    output = compiled(x)
    (gradient,) = torch.autograd.grad(output.sum(), [last.weight])
    with torch.no_grad():
        from_gradient = (gradient * last.weight).sum() + len(x) * last.bias.sum()
    torch.testing.assert_close(output.sum(), from_gradient, rtol=1e-4, atol=1e-2)


def test_a_compiled_layer_without_room_raises_the_same_error() -> None:
    layer = SlicedFeedForward(LAYERS["geglu"]().net, {"budget": 100})
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(NotEnoughMemoryError, match="feed-forward: needs"):
        compiled(torch.randn(2, 211, 61))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_bound_holds_under_the_default_compiler(training: bool) -> None:
    layer, x = SlicedFeedForward(FeedForward(61, mult=8).net, {"budget": "3MiB"}), torch.randn(6007, 61)
    x.requires_grad_(training)
    compiled: Any = torch.compile(layer, fullgraph=True)

    def peak(each: Any) -> int:
        def step() -> Any:
            output = each(x)
            wanted = [x, *layer.parameters()]
            return torch.autograd.grad(output, wanted, torch.ones_like(output)) if training else output

        with torch.set_grad_enabled(training):
            step()
            return peak_memory(step)

    eager = peak(layer)
    assert layer.plan is not None
    assert layer.plan.steps > 5
    assert peak(compiled) <= 1.1 * eager
