"""Swapped layers in a planned step: stand-ins on the device "meta", and the bytes of real ones.

In inference a swapped layer of attention projects and attends in parts (`slicemod.layers.streaming`), and a swapped
feed-forward takes some tokens at a time. There are more or fewer parts at another resolution. So the stand-ins compute
nothing. They mark places in the timeline: for attention before the layer's output exists, where a layer works that is
computed as a whole, and after it, where one in parts does; for a feed-forward after its output exists.

In training a feed-forward keeps its input alone, and works once more when the gradients exist. Layers of attention run
as they are, or once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slicemod.call import AttentionShape, CallSpec, upcasts
from slicemod.feed_forward.plan import FeedForwardShape
from slicemod.feed_forward.sizes import sizes_of
from slicemod.layers.streaming import StreamPlan, plan_stream
from slicemod.on_cpu.widened import largest_scratch
from slicemod.planning.memory_timeline import MemoryRecorder


@dataclass(frozen=True)
class LayerCall:
    """One of the two places of a layer.

    Attributes:
        call: of its attention, if that is computed as a whole.
        width: channels of the layer's output.
        in_parts: this is the place of a layer in parts. Otherwise it is that of one as a whole.
        scratch: bytes that a projection itself takes. A layer with such projections is computed as a whole.
    """

    call: CallSpec
    width: int
    in_parts: bool
    scratch: int = 0

    @property
    def parts(self) -> StreamPlan | None:
        """How the layer is computed in parts; None if it is computed as a whole."""
        if self.scratch:
            return None
        shape = self.call.shape
        return plan_stream(shape.heads, shape.queries, shape.keys, self.call.device.type)

    @property
    def attention(self) -> CallSpec | None:
        """The attention that is computed here; None if the layer works at its other place."""
        parts = self.parts
        if self.in_parts != (parts is not None):
            return None
        if parts is None:
            return self.call
        return replace(self.call, shape=replace(self.call.shape, batch=1, heads=parts.heads, queries=parts.rows))

    @property
    def held(self) -> int:
        """Bytes of projections and of the heads' output beside the attention, and beside the layer's output if it is
        in parts."""
        if self.attention is None:
            return 0
        shape, parts = self.attention.shape, self.parts
        tokens = shape.batch * (2 * shape.queries + 2 * shape.keys)
        held = tokens * shape.heads * shape.head_dim * shape.itemsize
        inner = self.call.shape.heads * shape.head_dim
        if parts is not None and parts.heads < parts.all_heads and inner != self.width:
            held += self.call.shape.queries * inner * shape.itemsize  # of all heads, before they are projected
        return held

    def working(self, attention: int) -> int:
        """Bytes of a layer that works at this place, if its attention takes so many."""
        held = self.held + attention
        if not self.scratch:
            return held
        shape = self.call.shape
        # The values are projected beside queries and keys, the output beside that of the heads.
        projected = max(shape.queries + 2 * shape.keys, 2 * shape.queries) * shape.batch * shape.heads * shape.head_dim
        return max(held, projected * shape.itemsize + self.scratch)


class LayerStandIn:
    """Stand-ins for the layers of diffusers that `swap_attention(feed_forward=True)` would swap, while `installed`.

    Args:
        recorder: is told when a layer works.
        device_type: that the step is planned for.
        calls: of the step, to which those of the layers are added.
        training: the step needs gradients. Then only feed-forwards have stand-ins.
    """

    def __init__(self, recorder: MemoryRecorder, device_type: str, calls: list[Any], *, training: bool = False) -> None:
        self._recorder, self._device_type, self._calls, self._training = recorder, device_type, calls, training

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Each layer's `forward` is a stand-in meanwhile."""
        forwards = {}
        for module in model.modules():
            if type(module).__name__ == "FeedForward":
                forwards[module] = self._trained(module) if self._training else self._feed_forward(module)
            elif not self._training and _is_plain_layer(module):
                forwards[module] = self._attention(module)
        with replaced_forwards(forwards):
            yield

    def _feed_forward(self, layer: Any) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            sizes = sizes_of(layer.net)
            output = hidden_states.new_empty(*hidden_states.shape[:-1], sizes.out)
            tokens = hidden_states.numel() // hidden_states.shape[-1]
            self._work(sizes.shape(tokens, hidden_states.element_size()))
            return output

        return forward

    def _trained(self, layer: Any) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            sizes, weights = sizes_of(layer.net), list(layer.parameters())
            tokens = hidden_states.numel() // hidden_states.shape[-1]
            trains_weights = any(weight.requires_grad for weight in weights)
            size = hidden_states.element_size()
            shape = sizes.shape(tokens, size, training=True, trains_weights=trains_weights)
            output: Tensor = _Trained.apply(lambda: self._work(shape), sizes.out, hidden_states, *weights)
            return output

        return forward

    def _attention(self, layer: Any) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
            tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            (batch, queries, _width), keys = hidden_states.shape, tokens.shape[1]
            size = hidden_states.element_size()
            shape = AttentionShape(batch, layer.heads, queries, keys, layer.to_q.out_features // layer.heads, size)
            shape = replace(shape, upcast=upcasts(self._device_type, size))
            call = CallSpec.planned(shape, self._device_type, hidden_states.dtype)
            whole = LayerCall(call, layer.to_out[0].out_features, in_parts=False, scratch=_scratch(layer))
            self._work(whole)
            output = hidden_states.new_empty(batch, queries, whole.width)
            self._work(replace(whole, in_parts=True))
            return output

        return forward

    def _work(self, call: LayerCall | FeedForwardShape) -> None:
        self._calls.append(call)
        self._recorder.work(len(self._calls) - 1)


class _Trained(torch.autograd.Function):
    """A feed-forward that keeps its input, and works in both passes."""

    @staticmethod
    def forward(ctx: Any, work: Callable[[], None], out: int, tokens: Tensor, *weights: Tensor) -> Tensor:
        output = tokens.new_empty(*tokens.shape[:-1], out)
        work()
        ctx.work = work
        ctx.save_for_backward(tokens, *weights)
        return output

    @staticmethod
    def backward(ctx: Any, *_grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        gradients = [torch.empty_like(given) if needed else None for given, needed in wanted]
        ctx.work()
        return None, None, *gradients


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """The attention layers of diffusers keep their inputs alone meanwhile, as with `checkpoint="layer"`."""
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Attention"]

    def recomputed(layer: Any) -> Callable[..., Tensor]:
        forward = layer.forward
        return lambda *given, **named: checkpoint(forward, *given, use_reentrant=False, **named)

    with replaced_forwards({layer: recomputed(layer) for layer in layers}):
        yield


@contextmanager
def replaced_forwards(forwards: dict[Any, Callable[..., Tensor]]) -> Iterator[None]:
    """These modules have these methods meanwhile."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _scratch(layer: Any) -> int:
    """Bytes that a projection of a layer takes itself, at most."""
    return largest_scratch(layer.to_q, layer.to_k, layer.to_v, layer.to_out[0])


def _is_plain_layer(module: Any) -> bool:
    """A layer of diffusers between two norms of a block, with projections alone."""
    return (
        type(module).__name__ == "Attention"
        and all(isinstance(getattr(module, name, None), nn.Linear) for name in ("to_q", "to_k", "to_v"))
        and not any(getattr(module, name, None) is not None for name in ("norm_q", "add_k_proj", "group_norm"))
        and getattr(module, "spatial_norm", None) is None
        and not module.residual_connection
    )
