"""`SlicedFeedForward`: the feed-forward of a transformer block, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slicemod.call import needs_grad
from slicemod.config import SETTINGS, SliceConfig
from slicemod.feed_forward.fused import fused
from slicemod.feed_forward.gates import Gate, gate_of
from slicemod.feed_forward.operators import feed_forward
from slicemod.feed_forward.plan import FeedForwardPlan, plan_feed_forward
from slicemod.feed_forward.sizes import FeedForwardSizes, first_projection, is_product, sizes_of
from slicemod.graph_operators import refused
from slicemod.plan import NotEnoughMemoryError
from slicemod.watched import PlainValues, constant_in_graph, plain_values


class SlicedFeedForward(nn.Module):
    """The parts of `net` one after the other, for some tokens at a time.

    In training each chunk is computed again in the backward pass, with the same random numbers, so that only the input
    is kept for it. The attribute `plan` is the plan of the last eager call.

    Args:
        net: projection with activation, dropout, projection, as in diffusers, CompVis LDM and Stability sgm.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one. Only `budget` and `checkpoint`
            matter.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Sequential(nn.Linear(5, 20), nn.GELU()), nn.Dropout(0.0), nn.Linear(20, 5))
    >>> SlicedFeedForward(net)(torch.zeros(2, 7, 5)).shape
    torch.Size([2, 7, 5])
    """

    def __init__(
        self, net: nn.ModuleList | nn.Sequential, slicing: SliceConfig | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.slicing = SliceConfig.of(slicing)
        self.plan: FeedForwardPlan | None = None  # of the last eager call

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the feed-forward.

        Args:
            hidden_states: `(..., C)`.

        Returns:
            `(..., C')`.

        Raises:
            NotEnoughMemoryError: not even one token fits the budget.
        """
        sizes = sizes_of(self.net)
        if hidden_states.numel() == 0:
            return self._whole(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, C)
        copied = 0 if hidden_states.is_contiguous() else tokens.nbytes
        trains_weights = needs_grad(*self.parameters())
        training = trains_weights or needs_grad(tokens)
        call = (len(tokens), tokens.element_size(), copied, training, trains_weights, str(tokens.device), *sizes)
        if torch.compiler.is_dynamo_compiling():
            found = _plan_in_graph(plain_values(self.slicing, SETTINGS), *call)
            if isinstance(found, str):
                nothing: Tensor = refused(tokens[None, None], tokens.new_empty(1, 1, 1, sizes.out), found)
                return nothing.view(*hidden_states.shape[:-1], sizes.out)
            plan = found
        else:
            plan = self.plan = _planned(self.slicing, *call)
        output: Tensor = self._in_chunks(tokens, plan)
        return output.view(*hidden_states.shape[:-1], output.shape[-1])

    def _whole(self, hidden_states: Tensor) -> Tensor:
        for part in self.net:
            hidden_states = part(hidden_states)
        return hidden_states

    def _in_chunks(self, tokens: Tensor, plan: FeedForwardPlan) -> Tensor:
        chunks = (tokens[start : start + plan.tokens] for start in range(0, len(tokens), plan.tokens))
        products = None if plan.checkpoint or torch.compiler.is_compiling() else fused(self.net, tokens, plan.tokens)
        compute: Callable[[Tensor], Tensor] = self._whole if products is None else products.compute
        results = (
            checkpoint(self._whole, chunk, use_reentrant=False) if plan.checkpoint else compute(chunk)
            for chunk in chunks
        )
        if plan.steps == 1 and not (plan.checkpoint and torch.compiler.is_compiling()):
            return next(results)
        if torch.compiler.is_compiling():
            gate = self._plain_gate()
            if gate is None:
                return torch.cat(list(results))  # into which the compiler has the chunks computed
            first, second = first_projection(self.net[0]), self.net[2]
            biases = [] if first.bias is None else [first.bias, second.bias]
            output: Tensor = feed_forward(tokens, [first.weight, second.weight], biases, *gate, plan.tokens)
            return output
        return _joined(results, len(tokens))

    def _plain_gate(self) -> Gate | None:
        """The gate if one operator computes all that the parts do; None if they do more, such as LoRA and dropout."""
        first, second = first_projection(self.net[0]), self.net[2]
        if not is_product(first) or not is_product(second) or torch.is_autocast_enabled(first.weight.device.type):
            return None
        drops = any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in self.net)
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (first, *self.net))
        if drops or hooked or (first.bias is None) != (second.bias is None):
            return None
        return gate_of(self.net[0])

    def extra_repr(self) -> str:
        """Slicing and the last plan, in the module's `repr`."""
        return f"{self.slicing}{'' if self.plan is None else f', plan: {self.plan}'}"


def _joined(results: Iterable[Tensor], tokens: int) -> Tensor:
    """The rows of the results, one below the other. Only one result is held beside them."""
    output, start = None, 0
    for result in results:
        if output is None:
            output = result.new_empty(tokens, *result.shape[1:])
        output = _Written.apply(output, result, start) if result.requires_grad else _write(output, result, start)
        start += len(result)
        del result  # frees it before the next one is computed
    if output is None:
        raise ValueError("results: expected one at least; got none. Do not join the chunks of no tokens.")
    return output


def _write(output: Tensor, result: Tensor, start: int) -> Tensor:
    output[start : start + len(result)] = result
    return output


class _Written(torch.autograd.Function):
    """Writes a result into its rows of an output. PyTorch's own gradient of this copies the whole output each time."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, result: Tensor, start: int) -> Tensor:
        ctx.rows = slice(start, start + len(result))
        ctx.mark_dirty(output)
        return _write(output, result, start)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """No earlier result looks at these rows of the gradient, so it goes on as it is."""
        grad_output = grad_outputs[0]
        return grad_output if ctx.needs_input_grad[0] else None, grad_output[ctx.rows], None


def _planned(
    slicing: SliceConfig,
    tokens: int,
    itemsize: int,
    copied: int,
    training: bool,
    trains_weights: bool,
    device: str,
    *sizes: Any,
) -> FeedForwardPlan:
    shape = FeedForwardSizes(*sizes).shape(
        tokens, itemsize, training=training, trains_weights=trains_weights, checkpoint=bool(slicing.checkpoint)
    )
    shape = replace(shape, fixed=shape.fixed + copied)
    where = torch.device(device)
    return plan_feed_forward(shape, slicing.parsed_budget.bytes_on(where), where.type)


@constant_in_graph
def _plan_in_graph(settings: PlainValues, *call: Any) -> FeedForwardPlan | str:
    """The plan of a call, or the text that says why there is none; see `slicemod.functional`."""
    try:
        return _planned(SliceConfig(*settings), *call)
    except NotEnoughMemoryError as error:
        return str(error)
