"""One step of a UNet, run without its memory: inference, or forward, backward and optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from slicemod.planning.attention_stand_in import AttentionCall, AttentionStandIn
from slicemod.planning.cpu_temporaries import cpu_temporaries, no_temporaries
from slicemod.planning.memory_timeline import MemoryRecorder, Timeline
from slicemod.planning.unets import UnetSource, fake_inputs, fake_unet


class StepKind(NamedTuple):
    """What a step is, apart from its resolution.

    Attributes:
        dtype: of weights, latents and gradients.
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
    """The timeline of a step and its attention calls."""

    timeline: Timeline
    calls: tuple[AttentionCall, ...]


def trace_step(source: UnetSource, kind: StepKind, pixels: int) -> TracedStep:
    """Runs one step on square images of `pixels` by `pixels`. Takes no weights, no memory and no device.

    Raises:
        UserError: `source` describes no UNet.
    """
    mode = FakeTensorMode()
    unet = fake_unet(source, mode, kind.dtype)
    inputs = fake_inputs(unet, mode, kind.dtype, kind.batch, pixels // source.latent_pixels, source.context_tokens)
    recorder = MemoryRecorder(cpu_temporaries if kind.device_type == "cpu" else no_temporaries)
    stand_in = AttentionStandIn(recorder, kind.device_type)
    parameters = list(unet.parameters())
    held = [*parameters, *unet.buffers()]
    if not kind.training:
        recorder.ignore(held)
        with torch.no_grad(), mode, recorder, stand_in:
            unet(**inputs)
        return TracedStep(recorder.timeline(_nbytes(held), 0), tuple(stand_in.calls))

    if kind.checkpoint_blocks:
        unet.enable_gradient_checkpointing()
    unet.train()
    # What PyTorch takes by default: all parameters at once on an accelerator, one by one on a CPU.
    optimizer = torch.optim.AdamW(parameters, foreach=kind.device_type != "cpu")
    with mode:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes its state, which the steps after the first begin with
        optimizer.zero_grad(set_to_none=True)
        target = torch.empty_like(inputs["sample"])
    state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
    recorder.ignore([*held, *state, target])
    with mode, recorder, stand_in:
        F.mse_loss(unet(**inputs).sample, target).backward()
        recorder.count_as_gradients(parameter.grad for parameter in parameters if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return TracedStep(recorder.timeline(_nbytes(held), _nbytes(state)), tuple(stand_in.calls))


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
