"""What training would take, before anything is trained: the plans and the peak of each bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn

from slicemod import SlicePlan, restore_attention
from slicemod.call import CallSpec
from slicemod.card import card_of
from slicemod.choose import plans_of
from slicemod.kernels import kernel_named
from slicemod.memory.sizes import size_text
from slicemod.planning.attention_costs import full_attention_cost, fused_attention_cost, planned_attention_cost
from slicemod.planning.layer_calls import recomputed_layers
from slicemod.planning.memory_timeline import AttentionCost, StepPeak
from slicemod.planning.plan_report import attention_table
from slicemod.planning.step_peaks import TRACED_STEPS, LayerPlan
from slicemod.planning.unet_step import TracedStep, trace_training
from slicemod.planning.unets import meta_inputs
from slicemod.planning.whole_latents import pixels_per_latent, resolution_step
from slicemod.torch_internals import FakeTensorMode
from slicemod.training.common.weight_average import WeightAverage
from slicemod.training.stable_diffusion.aspect_buckets import Bucket
from slicemod.training.stable_diffusion.captioned_folder import CaptionedFolder
from slicemod.training.stable_diffusion.lightning_module import StableDiffusion


@dataclass(frozen=True)
class BucketForecast:
    """One bucket's training step.

    Attributes:
        bucket: the image size.
        images: how many of those to train on fall into it.
        layers: every shape of attention, largest scores first.
        peak: of the step, in its parts.
    """

    bucket: Bucket
    images: int
    layers: tuple[LayerPlan, ...]
    peak: StepPeak


def forecast(model: StableDiffusion, data: CaptionedFolder, trainer: pl.Trainer) -> list[BucketForecast]:
    """Plans every bucket that the data has images for; neither the device nor its memory is touched.

    The step is run without memory at two resolutions, under the trainer's precision, and put together from these for
    each bucket. A budget that refers to free memory is taken of what is free now.

    Args:
        model: what would be trained.
        data: what it would be trained on.
        trainer: what would train it.

    Raises:
        NotEnoughMemoryError: no plan of a bucket fits the budget.
        ObstacleError: the kernel that the settings name cannot run the attention.
    """
    device = trainer.strategy.root_device
    unit = pixels_per_latent(model.pretrained.autoencoder_config())
    step = resolution_step(unit, model.unet.config)
    low, high = (steps * step for steps in TRACED_STEPS)
    first, second = (_trace(model, trainer, device, data.batch_size, edge // unit) for edge in (low, high))
    state = optimizer_bytes(model.unet, model.make_optimizer)
    averages = sum(isinstance(callback, WeightAverage) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    copies = averages * sum(parameter.nbytes for parameter in model.unet.parameters())
    counted = Counter(data.bucket(image) for image in data.train_images)
    forecasts = []
    for bucket, images in sorted(counted.items()):
        traced = first.between(second, bucket.height * bucket.width - low**2, high**2 - low**2)
        calls = [replace(call, card=card_of(device)) for call in traced.calls]
        answers = {call: _answer(model, call) for call in set(calls)}
        peak = traced.timeline.peak([answers[call][1] for call in calls])
        counted_calls = Counter(calls[: traced.layers])
        largest_first = sorted(counted_calls.items(), key=lambda item: -item[0].shape.scores_bytes)
        layers = tuple(LayerPlan(call.shape, count, answers[call][0]) for call, count in largest_first)
        forecasts.append(
            BucketForecast(bucket, images, layers, peak._replace(weights=peak.weights + copies, optimizer=state))
        )
    return forecasts


def _trace(model: StableDiffusion, trainer: pl.Trainer, device: torch.device, batch: int, edge: int) -> TracedStep:
    """The step on latents of `edge` by `edge`, by a twin of the UNet whose tensors have no memory."""
    mode = FakeTensorMode()
    with mode:
        unet = _twin(model.unet, device)
    if model.attention is not None:
        restore_attention(unet)
    meta = meta_inputs(unet, torch.float32, batch, edge, model.context_tokens)
    with mode:

        def on_device(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        inputs: dict[str, Any] = {
            name: {key: on_device(tensor) for key, tensor in value.items()}
            if isinstance(value, dict)
            else on_device(value)
            for name, value in meta.items()
        }
        target = torch.empty_like(inputs["sample"])
        if trainer.accumulate_grad_batches > 1:
            for parameter in unet.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    def loss() -> Tensor:
        held = [torch.empty_like(target) for _ in range(4)]  # latents, two noises, their sum: as `denoising_losses`
        with trainer.precision_plugin.forward_context(), model.frozen_autocast(device):
            predicted = unet(**{**inputs, "sample": held[-1]}).sample
        return F.mse_loss(predicted.float(), target)

    recomputes = model.attention is not None and model.attention.recomputes_layers
    with recomputed_layers(unet) if recomputes else nullcontext():
        return trace_training(unet, loss, device.type, [target], mode)


def _twin(module: nn.Module, device: torch.device) -> Any:
    """A copy on the device, whose tensors are of the mode that is active."""
    tensors: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return deepcopy(module, tensors)


def _answer(model: StableDiffusion, call: CallSpec) -> tuple[SlicePlan | None, AttentionCost]:
    """The plan of a call and what it takes."""
    if model.attention is not None:
        plan = plans_of(call, model.attention).now()
        return plan, planned_attention_cost(call, plan)
    if kernel_named("fused").obstacle(call) is None:
        return None, fused_attention_cost(call)
    upcast = bool(model.unet.config.upcast_attention)
    return None, full_attention_cost(call, upcast=upcast)


def optimizer_bytes(module: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], Any]) -> int:
    """Bytes of the state that the optimizer keeps for the trained parameters of a module."""
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    probe = nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    optimizer = make_optimizer([probe])
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor))
    return trained * (kept // probe.nbytes)  # rounds away what it keeps once a tensor


def plan_table(forecasts: Sequence[BucketForecast]) -> Table:
    """A row for each bucket and attention."""
    return attention_table("attention layers", "bucket", [(str(row.bucket), row.layers) for row in forecasts])


def peak_table(forecasts: Sequence[BucketForecast]) -> Table:
    """A row for each bucket: what the whole step holds at its peak."""
    parts = ("weights", "activations", "gradients", "optimizer", "attention", "total")
    table = Table(title="peak of a training step", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("bucket", "images", *parts):
        table.add_column(column, justify="right", no_wrap=True)
    for row in forecasts:
        table.add_row(str(row.bucket), str(row.images), *(size_text(getattr(row.peak, part)) for part in parts))
    return table
