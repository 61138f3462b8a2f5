"""What training would take, before anything is trained: the plans and the bytes of each bucket."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import nn

from slicemod import AttentionShape, SliceConfig, SlicePlan
from slicemod.planning.attention_calls import LayersAlike, record_attention_calls
from slicemod.training.aspect_buckets import Bucket
from slicemod.training.captioned_folder import CaptionedFolder
from slicemod.training.frozen_stages import pixels_per_latent
from slicemod.training.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class BucketForecast:
    """One bucket's training step.

    Attributes:
        bucket: the image size.
        images: how many of those to train on fall into it.
        plans: of each distinct attention, with the number of layers that compute it.
        attention_bytes: what the attention that needs most takes beyond its inputs and outputs.
        state_bytes: weights, gradients and the optimizer's state.
    """

    bucket: Bucket
    images: int
    plans: tuple[tuple[int, AttentionShape, SlicePlan], ...]
    attention_bytes: int
    state_bytes: int


def forecast(
    model: StableDiffusion, data: CaptionedFolder, device: torch.device, itemsize: int
) -> list[BucketForecast]:
    """Plans every bucket that the data has images for; neither the device nor its memory is touched.

    Args:
        model: what would be trained.
        data: what it would be trained on.
        device: where; PyTorch's fused attention is taken to run there.
        itemsize: bytes per element of the attention's inputs.

    Raises:
        NotEnoughMemoryError: no plan of a bucket fits the budget.
    """
    slicing = model.attention or SliceConfig()
    unit = pixels_per_latent(model.pretrained.autoencoder_config())
    with tempfile.TemporaryDirectory() as folder:  # record_attention_calls reads configs
        (Path(folder) / "config.json").write_text(json.dumps(dict(model.unet.config)))
        calls = record_attention_calls(folder, batch=data.batch_size, itemsize=itemsize)
    counted = Counter(data.bucket(image) for image in data.train_images)
    state = state_bytes(model.unet, model.make_optimizer)
    forecasts = []
    for bucket in sorted(counted):
        shapes = [(call.layers, _at(call, bucket, unit)) for call in calls]
        plans = tuple(
            (layers, shape, slicing.plan(shape, device, training=True, fused_obstacle=None)) for layers, shape in shapes
        )
        most = max((plan.peak_bytes for _, _, plan in plans), default=0)
        forecasts.append(BucketForecast(bucket, counted[bucket], plans, most, state))
    return forecasts


def state_bytes(module: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], Any]) -> int:
    """Bytes of weights, of the gradients of those trained, and of the state that the optimizer keeps for them."""
    weights = sum(parameter.nbytes for parameter in module.parameters())
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    probe = nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    optimizer = make_optimizer([probe])
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor))
    return weights + trained + trained * (kept // probe.nbytes)  # rounds away what it keeps once a tensor


def forecast_table(forecasts: list[BucketForecast]) -> Table:
    """A row for each bucket and attention."""
    table = Table(title="a training step of each bucket", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("bucket", "images", "layers", "heads x N x M x D", "plan", "attention", "with the state"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in forecasts:
        table.add_section()
        for place, (layers, shape, plan) in enumerate(row.plans):
            first = (str(row.bucket), str(row.images)) if place == 0 else ("", "")
            sizes = (shape.batch * shape.heads, shape.queries, shape.keys, shape.head_dim)
            total = _size(row.attention_bytes + row.state_bytes) if place == 0 else ""
            table.add_row(
                *first, str(layers), "x".join(map(str, sizes)), f"{plan.steps} x {plan.slice_size}",
                _size(plan.peak_bytes), total,
            )  # fmt: skip
    return table


def _at(call: LayersAlike, bucket: Bucket, unit: int) -> AttentionShape:
    """The call's shape on an image of another size; ``call`` is of a square one."""
    recorded = (call.pixels // 8) ** 2  # latents of 8 pixels each, as record_attention_calls takes a folder's to be
    queries = call.shape.queries * (bucket.height // unit) * (bucket.width // unit) // recorded
    return replace(call.shape, queries=queries, keys=queries if call.is_self_attention else call.shape.keys)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
