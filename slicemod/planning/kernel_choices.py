"""Which kernels a device has, and which one each attention layer of a model takes there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from slicemod import kernels
from slicemod.call import AttentionShape, CallSpec, upcasts
from slicemod.choose import Answer, answers
from slicemod.config import SliceConfig
from slicemod.plan import SlicePlan
from slicemod.planning.model_layers import ModelLayers

_TRAINING_BATCH = 1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = AttentionShape(1, 8, 4096, 4096, 40, 4)  # SD1.5's largest layer, which every kernel computes


class Presence(NamedTuple):
    """Whether a device has a kernel.

    Attributes:
        kernel: its name.
        summary: what it is, in a line.
        dtypes: in which it runs plain attention there.
        obstacle: why it runs in none, or None.
    """

    kernel: str
    summary: str
    dtypes: tuple[torch.dtype, ...]
    obstacle: str | None


class LayerChoice(NamedTuple):
    """Which kernel takes the attention layers of one shape, in inference or in training.

    Attributes:
        layers: how many there are.
        training: gradients are needed.
        shape: of the call.
        answers: of all kernels, best first.
    """

    layers: int
    training: bool
    shape: AttentionShape
    answers: tuple[Answer, ...]

    @property
    def plan(self) -> SlicePlan | None:
        """Of the kernel that takes them, if there is one."""
        return next((answer.plan for answer in self.answers if answer.passed_over is None), None)

    @property
    def passed_over(self) -> dict[str, str]:
        """The kernels that come before it, or all where none takes them, and why they do not."""
        reasons = {}
        for answer in self.answers:
            if answer.passed_over is None:
                break
            reasons[answer.kernel] = answer.passed_over
        return reasons


def kernels_on(device: torch.device) -> Iterator[Presence]:
    """For each kernel, whether `device` has it."""
    for kernel in kernels.KERNELS:
        obstacles = {dtype: kernel.obstacle(_call(_PLAIN, device, dtype, training=False)) for dtype in _DTYPES}
        dtypes = tuple(dtype for dtype, obstacle in obstacles.items() if obstacle is None)
        # Of a kernel for half precision alone, the obstacle in float32 would not be the one that counts.
        yield Presence(kernel.name, kernel.summary, dtypes, None if dtypes else obstacles[_DTYPES[-1]])


def choices(
    model: ModelLayers,
    pixels: int,
    device: torch.device,
    dtype: torch.dtype,
    free_bytes: int,
) -> Iterator[LayerChoice]:
    """The choice for each of the layers, in inference and then in training.

    Args:
        model: its layers.
        pixels: edge of a square image.
        device: where they would run; it need not be there.
        dtype: of query, key and value.
        free_bytes: for each call.
    """
    for training, batch in ((False, model.guidance_batch), (True, _TRAINING_BATCH)):
        for alike in model.layers:
            shape = replace(alike.at_resolution(pixels).shape, batch=batch)
            call = _call(shape, device, dtype, training=training)
            yield LayerChoice(alike.layers, training, call.shape, tuple(answers(call, SliceConfig(), free_bytes)))


def _call(shape: AttentionShape, device: torch.device, dtype: torch.dtype, *, training: bool) -> CallSpec:
    size = dtype.itemsize
    shape = replace(shape, itemsize=size, upcast=upcasts(device.type, size))
    return CallSpec.planned(shape, device, dtype, training=training)
