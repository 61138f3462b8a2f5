"""Runs one step of a model on the device "meta", and so without memory: a step of inference or of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.call import CallSpec
from slicemod.planning.attention_stand_in import AttentionStandIn
from slicemod.planning.cpu_temporaries import cpu_temporaries, no_temporaries
from slicemod.planning.layer_calls import LayerCall, LayerStandIn, recomputed_layers
from slicemod.planning.memory_timeline import MemoryRecorder, Timeline
from slicemod.planning.prepared_calls import PreparedCall, PreparedStandIn, become_prepared
from slicemod.planning.step_source import StepSource
from slicemod.torch_internals import tree_leaves


class StepKind(NamedTuple):
    """What a step is, apart from its resolution.

    Attributes:
        dtype: the dtype of weights, latents, activations and gradients.
        batch: items in the model's batch; with classifier-free guidance two for each image.
        device_type: the device that is simulated.
        training: forward, backward and a step of AdamW, instead of forward alone.
        checkpoint_blocks: the model's own gradient checkpointing is on.
        streams_weights: each layer's weights are loaded when it runs and taken away after it, as accelerate's
            sequential offloading does.
        swapped: the layers of diffusers' UNets are swapped, and are left to their plans as attention is. In training
            only the feed-forwards are.
        recomputes_layers: in training, attention layers are computed once more in the backward pass.
        prepared: in inference on a CPU, the model is what `prepare_for_cpu` makes of it.
    """

    dtype: torch.dtype
    batch: int
    device_type: str
    training: bool = False
    checkpoint_blocks: bool = False
    streams_weights: bool = False
    swapped: bool = False
    recomputes_layers: bool = False
    prepared: bool = False


class TracedStep(NamedTuple):
    """A step.

    Attributes:
        timeline: what it allocates and frees.
        calls: of attention and of swapped layers, in order.
        layers: how many of them are in the forward pass.
        inputs: bytes of the tensors that it is given, which the timeline leaves out.
        prepared: calls of prepared modules, in order.
    """

    timeline: Timeline
    calls: tuple[Any, ...]
    layers: int
    inputs: int = 0
    prepared: tuple[PreparedCall, ...] = ()

    def between(self, other: TracedStep, part: int, whole: int) -> TracedStep:
        """The step at `part / whole` of the way to the `other` one, which differs only in its resolution.

        Raises:
            ValueError: the steps do not run the same operators.
        """

        calls = (_between(a, b, part, whole) for a, b in zip(self.calls, other.calls, strict=True))
        inputs = self.inputs + (other.inputs - self.inputs) * part // whole
        prepared = tuple(a.between(b, part, whole) for a, b in zip(self.prepared, other.prepared, strict=True))
        timeline = self.timeline.between(other.timeline, part, whole)
        timeline = timeline.with_temporaries({call.row: call.scratch_bytes for call in prepared})
        return TracedStep(timeline, tuple(calls), self.layers, inputs, prepared)


def _between(a: Any, b: Any, part: int, whole: int) -> Any:
    """The call at `part / whole` of the way from one to another, which differs only in its numbers of tokens."""
    if isinstance(a, LayerCall):
        return replace(a, call=_between(a.call, b.call, part, whole))
    if isinstance(a, CallSpec):
        return replace(a, shape=_between(a.shape, b.shape, part, whole))
    names = [name for name in ("queries", "keys", "tokens") if hasattr(a, name)]
    return replace(
        a, **{name: getattr(a, name) + (getattr(b, name) - getattr(a, name)) * part // whole for name in names}
    )


def trace_step(source: StepSource, kind: StepKind, pixels: int) -> TracedStep:
    """Runs one step on square images of `pixels` by `pixels`, without weights and without the device.

    A training step is not the first one: AdamW's state exists when it begins.

    Raises:
        UserError: `source` describes no model, or one of which nothing can be `prepared`.
    """
    model = source.model(kind.dtype).train(kind.training)
    if kind.prepared:
        become_prepared(model)
    inputs = source.inputs(model, kind.dtype, kind.batch, pixels)
    given = [tensor for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)]
    if kind.training:
        if kind.checkpoint_blocks:
            model.enable_gradient_checkpointing()
        target = torch.empty_like(inputs[source.latents_name])

        def loss() -> Tensor:
            predicted = source.run(model, inputs)
            learns_variance = predicted.shape != target.shape  # it predicts twice as many channels
            return F.mse_loss(predicted.chunk(2, dim=1)[0] if learns_variance else predicted, target)

        with recomputed_layers(model) if kind.recomputes_layers else nullcontext():
            return trace_training(model, loss, kind.device_type, [*given, target], feed_forward=kind.swapped)
    return trace_inference(model, lambda: source.run(model, inputs), kind, given)


def trace_inference(
    model: nn.Module, call: Callable[[], object], kind: StepKind, given: Sequence[Tensor] = ()
) -> TracedStep:
    """Runs what needs no gradients.

    Args:
        model: without memory, on the device "meta".
        call: runs it.
        kind: what the step is.
        given: other tensors that exist already.
    """
    recorder = _recorder(kind.device_type)
    stand_in = AttentionStandIn(recorder, kind.device_type)
    prepared = PreparedStandIn(recorder)
    tensors = _held_by(model)
    recorder.ignore([*tensors, *given])
    streamed = _stream_weights(model, recorder) if kind.streams_weights else 0
    layers = LayerStandIn(recorder, kind.device_type, stand_in.calls)
    swapped = layers.installed(model) if kind.swapped else nullcontext()
    with torch.no_grad(), recorder, stand_in.installed(), prepared.installed(model), swapped:
        call()
    weights = sum(tensor.nbytes for tensor in tensors) - streamed
    inputs = sum(tensor.nbytes for tensor in given)
    timeline, calls = recorder.timeline(weights, 0), tuple(stand_in.calls)
    return TracedStep(timeline, calls, len(calls), inputs, tuple(prepared.calls))


def _stream_weights(model: nn.Module, recorder: MemoryRecorder) -> int:
    """Has each module load its own weights when it runs, and tells the bytes of all. Buffers stay loaded."""
    streamed = 0
    for module in model.modules():
        if size := sum(parameter.nbytes for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, size=size: recorder.load(size))
            module.register_forward_hook(lambda *_, size=size: recorder.load(-size))
            streamed += size
    return streamed


def trace_training(
    model: nn.Module,
    loss: Callable[[], Tensor],
    device_type: str,
    given: Sequence[Tensor] = (),
    mode: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - has no state
    *,
    feed_forward: bool = False,
) -> TracedStep:
    """Runs a training step of AdamW. It is not the first one: AdamW's state exists when it begins.

    Args:
        model: a UNet or a transformer without memory, on the device "meta" or of fake tensors. If it has gradients,
            they are added to.
        loss: runs it forward, and returns the loss.
        device_type: the device that is simulated.
        given: other tensors that exist already.
        mode: the mode of the fake tensors, which is entered for the step.
        feed_forward: feed-forwards are swapped, and are left to their plans as attention is.
    """
    recorder = _recorder(device_type)
    stand_in = AttentionStandIn(recorder, device_type, training=True)
    parameters = list(model.parameters())
    accumulated = [parameter.grad for parameter in parameters if parameter.grad is not None]
    held = _held_by(model)
    recorder.ignore([*held, *accumulated, *given])
    swapped = LayerStandIn(recorder, device_type, stand_in.calls, training=True).installed(model)
    with mode, recorder, stand_in.installed(), swapped if feed_forward else nullcontext():
        value = loss()
        layers = len(stand_in.calls)
        torch.autograd.backward(value)
    recorder.count_as_gradients(parameter.grad for parameter in parameters if parameter.grad is not None)
    sizes = [parameter.nbytes for parameter in parameters if parameter.requires_grad]
    # AdamW divides by the root of its second moments: of all parameters together on an accelerator (foreach=True,
    # the default there), of one after the other on a CPU, where the root and the quotient are two tensors.
    recorder.hold_for_a_while(2 * max(sizes) if device_type == "cpu" else sum(sizes))
    weights = sum(tensor.nbytes for tensor in (*held, *accumulated))
    inputs = sum(tensor.nbytes for tensor in given)
    return TracedStep(recorder.timeline(weights, 2 * sum(sizes)), tuple(stand_in.calls), layers, inputs)


def _held_by(model: nn.Module) -> list[Tensor]:
    """Weights, buffers, and tables that a module keeps without naming them a buffer, as Qwen-Image does."""
    tables = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return [*model.parameters(), *model.buffers(), *tables]


def _recorder(device_type: str) -> MemoryRecorder:
    return MemoryRecorder(cpu_temporaries if device_type == "cpu" else no_temporaries)
