"""One step of a UNet, run on the device "meta" and thus without memory: inference, or a step of training."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from slicemod.planning.attention_stand_in import AttentionCall, AttentionStandIn
from slicemod.planning.cpu_temporaries import cpu_temporaries, no_temporaries
from slicemod.planning.memory_timeline import MemoryRecorder, Timeline
from slicemod.planning.unets import UnetSource, meta_inputs, meta_unet


class StepKind(NamedTuple):
    """What a step is, apart from its resolution.

    Attributes:
        dtype: of weights, latents, activations and gradients.
        batch: items in the UNet's batch, two an image with classifier-free guidance.
        device_type: that is simulated.
        training: forward, backward and a step of AdamW, instead of forward alone.
        checkpoint_blocks: the UNet's own gradient checkpointing is on.
    """

    dtype: torch.dtype
    batch: int
    device_type: str
    training: bool = False
    checkpoint_blocks: bool = False


class TracedStep(NamedTuple):
    """A step: its timeline, its attention calls in order, and how many of them are in the forward pass."""

    timeline: Timeline
    calls: tuple[AttentionCall, ...]
    layers: int


def trace_step(source: UnetSource, kind: StepKind, pixels: int) -> TracedStep:
    """Runs one step on square images of `pixels` by `pixels`, with neither weights nor the device.

    In training this is any step but the first: AdamW's state is there when it begins.

    Raises:
        UserError: `source` describes no UNet.
    """
    unet = meta_unet(source, kind.dtype).train(kind.training)
    inputs = meta_inputs(unet, kind.dtype, kind.batch, pixels // source.latent_pixels, source.context_tokens)
    target = torch.empty_like(inputs["sample"])
    recorder = MemoryRecorder(cpu_temporaries if kind.device_type == "cpu" else no_temporaries)
    stand_in = AttentionStandIn(recorder, kind.device_type)
    parameters = list(unet.parameters())
    recorder.ignore([*parameters, *unet.buffers(), target])
    weights = sum(tensor.nbytes for tensor in (*parameters, *unet.buffers()))
    if not kind.training:
        with torch.no_grad(), recorder, stand_in.installed():
            unet(**inputs)
        return TracedStep(recorder.timeline(weights, 0), tuple(stand_in.calls), len(stand_in.calls))
    if kind.checkpoint_blocks:
        unet.enable_gradient_checkpointing()
    with recorder, stand_in.installed():
        loss = F.mse_loss(unet(**inputs).sample, target)
        layers = len(stand_in.calls)
        torch.autograd.backward(loss)
    recorder.count_as_gradients(parameter.grad for parameter in parameters if parameter.grad is not None)
    sizes = [parameter.nbytes for parameter in parameters if parameter.requires_grad]
    # AdamW divides by the root of its second moments: of all parameters together on an accelerator (foreach=True,
    # the default there), of one after the other on a CPU, where the root and the quotient are two tensors.
    recorder.hold_for_a_while(2 * max(sizes) if kind.device_type == "cpu" else sum(sizes))
    return TracedStep(recorder.timeline(weights, 2 * sum(sizes)), tuple(stand_in.calls), layers)
