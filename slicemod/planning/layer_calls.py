"""Swapped layers in a planned step: stand-ins on the device "meta", and the bytes of real ones.

In inference a swapped layer of attention projects and attends in parts (`slicemod.layers.streaming`), and a swapped
feed-forward takes some tokens at a time. There are more or fewer parts at another resolution. So the stand-ins compute
nothing. They mark places in the timeline: for attention before the layer's output exists, where a layer works that is
computed as a whole, and after it, where one in parts does; for a feed-forward after its output exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from slicemod.call import AttentionShape, CallSpec, upcasts
from slicemod.feed_forward.plan import FeedForwardShape
from slicemod.feed_forward.sizes import sizes_of
from slicemod.layers.streaming import StreamPlan, plan_stream
from slicemod.planning.memory_timeline import MemoryRecorder


@dataclass(frozen=True)
class LayerCall:
    """One of the two places of a layer.

    Attributes:
        call: of its attention, if that is computed as a whole.
        width: channels of the layer's output.
        in_parts: this is the place of a layer in parts. Otherwise it is that of one as a whole.
    """

    call: CallSpec
    width: int
    in_parts: bool

    @property
    def parts(self) -> StreamPlan | None:
        """How the layer is computed in parts; None if it is computed as a whole."""
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


class LayerStandIn:
    """Stand-ins for the layers of diffusers that `swap_attention(feed_forward=True)` would swap, while `installed`.

    Args:
        recorder: is told when a layer works.
        device_type: that the step is planned for.
        calls: of the step, to which those of the layers are added.
    """

    def __init__(self, recorder: MemoryRecorder, device_type: str, calls: list[Any]) -> None:
        self._recorder, self._device_type, self._calls = recorder, device_type, calls

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Each layer's `forward` is a stand-in meanwhile."""
        layers = [module for module in model.modules() if _is_plain_layer(module)]
        for layer in layers:
            layer.forward = self._attention(layer)
        feed_forwards = [module for module in model.modules() if type(module).__name__ == "FeedForward"]
        for layer in feed_forwards:
            layer.forward = self._feed_forward(layer)
        layers += feed_forwards
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _feed_forward(self, layer: Any) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            sizes = sizes_of(layer.net)
            output = hidden_states.new_empty(*hidden_states.shape[:-1], sizes.out)
            tokens = hidden_states.numel() // hidden_states.shape[-1]
            self._work(sizes.shape(tokens, hidden_states.element_size()))
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
            width = layer.to_out[0].out_features
            self._work(LayerCall(call, width, in_parts=False))
            output = hidden_states.new_empty(batch, queries, width)
            self._work(LayerCall(call, width, in_parts=True))
            return output

        return forward

    def _work(self, call: LayerCall | FeedForwardShape) -> None:
        self._calls.append(call)
        self._recorder.work(len(self._calls) - 1)


def _is_plain_layer(module: Any) -> bool:
    """A layer of diffusers between two norms of a block, with projections alone."""
    return (
        type(module).__name__ == "Attention"
        and all(isinstance(getattr(module, name, None), nn.Linear) for name in ("to_q", "to_k", "to_v"))
        and not any(getattr(module, name, None) is not None for name in ("norm_q", "add_k_proj", "group_norm"))
        and getattr(module, "spatial_norm", None) is None
        and not module.residual_connection
    )
