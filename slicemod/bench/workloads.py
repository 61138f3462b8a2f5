"""Works of models: attention layers and whole UNets, with random weights; and which works a name stands for."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench.bench_options import CALLS, WORK_NAMES
from slicemod.bench.calls import calls_of
from slicemod.bench.peers import REFERENCE, Peer
from slicemod.bench.work import Exact, Work, some_rows
from slicemod.call import AttentionShape
from slicemod.planning.attention_calls import record_attention_calls
from slicemod.planning.layers_alike import LayersAlike
from slicemod.planning.unets import find_unet, meta_inputs
from slicemod.user_error import UserError


@dataclass(frozen=True)
class LayerWork(Work):
    """One cross-attention layer: `(batch, queries, channels)` in, `context` tokens and channels or its own."""

    series: str
    size: int
    batch: int
    queries: int
    channels: int
    heads: int
    head_dim: int
    context: tuple[int, int] | None = None

    def build(self) -> nn.Module:
        """A MemoryAwareCrossAttention."""
        context_dim = None if self.context is None else self.context[1]
        return MemoryAwareCrossAttention(self.channels, context_dim, self.heads, self.head_dim)

    def inputs(self) -> tuple[Any, ...]:
        """`x` `(batch, queries, channels)`, and `context` where there is one."""
        x = torch.randn(self.batch, self.queries, self.channels)
        return (x,) if self.context is None else (x, torch.randn(self.batch, *self.context))

    def computed_by(self, peer: Peer, base: nn.Module) -> nn.Module | None:
        """The layer around the attention of `peer`."""
        return peer.in_layer(base)

    def exact(self, base: nn.Module, inputs: tuple[Any, ...]) -> list[Exact]:
        """Of this one layer."""
        return [_exact_layer("", REFERENCE.in_layer(deepcopy(base).double()), inputs)]

    def attention(self) -> list[tuple[AttentionShape, int]]:
        """This one call."""
        keys = self.queries if self.context is None else self.context[0]
        return [(AttentionShape(self.batch, self.heads, self.queries, keys, self.head_dim, 4), 1)]


@dataclass(frozen=True)
class UnetWork(Work):
    """One step of a whole UNet of diffusers: its name in `NAMED_UNETS`, a YAML of configs/ or a diffusers folder.

    With `checkpoint_blocks` its blocks are computed again in the backward pass, by diffusers' own checkpointing.
    """

    model: str
    size: int
    batch: int
    checkpoint_blocks: bool = False

    @property
    def series(self) -> str:  # type: ignore[override]
        """The model."""
        return f"{Path(self.model).name} UNet{', blocks checkpointed' if self.checkpoint_blocks else ''}"

    def build(self) -> nn.Module:
        """A `UNet2DConditionModel`."""
        unet: nn.Module = UNet2DConditionModel(**find_unet(self.model).config)
        return unet

    def inputs(self) -> tuple[Any, ...]:
        """Latents, time, text, and what SDXL adds, in the order of `UNet2DConditionModel.forward`."""
        source = find_unet(self.model)
        with torch.device("meta"):
            unet = self.build()
        latents = self.size // source.latent_pixels
        given = meta_inputs(unet, torch.float32, self.batch, latents, source.context_tokens)
        added = {name: torch.randn(tensor.shape) for name, tensor in given.get("added_cond_kwargs", {}).items()}
        sample, text = (torch.randn(given[name].shape) for name in ("sample", "encoder_hidden_states"))
        return (sample, torch.full(given["timestep"].shape, 500), text, None, None, None, None, added)

    def computed_by(self, peer: Peer, base: nn.Module) -> nn.Module | None:
        """Another UNet with the same weights and the attention of `peer`."""
        with torch.device("meta"):
            twin: Any = self.build()
        twin.load_state_dict(base.state_dict(), assign=True)
        if self.checkpoint_blocks:
            twin.enable_gradient_checkpointing()
        return peer.in_unet(twin)

    def exact(self, base: nn.Module, inputs: tuple[Any, ...]) -> list[Exact]:
        """Of the first layer of each pair of sizes, with what goes into it in this UNet."""
        first: dict[tuple[torch.Size, ...], tuple[str, nn.Module, tuple[Tensor, ...]]] = {}

        def noting(path: str) -> Any:
            def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = tuple(x for x in (*args, kwargs.get("encoder_hidden_states")) if x is not None)
                first.setdefault(tuple(x.shape for x in given), (path, layer, given))

            return note

        layers = [(path, layer) for path, layer in base.named_modules() if isinstance(layer, Attention)]
        hooks = [layer.register_forward_pre_hook(noting(path), with_kwargs=True) for path, layer in layers]
        with torch.no_grad():
            base(*inputs)
        for hook in hooks:
            hook.remove()
        return [
            _exact_layer(path, REFERENCE.in_unet(deepcopy(layer).double()), given)
            for path, layer, given in first.values()
        ]

    def scores_bytes(self, itemsize: int, *, training: bool) -> int:
        """A checkpointed block's scores are gone when the next one runs."""
        return super().scores_bytes(itemsize, training=training and not self.checkpoint_blocks)

    def attention(self) -> list[tuple[AttentionShape, int]]:
        """The calls of all layers."""
        calls = record_attention_calls(self.model, batch=self.batch, itemsize=4)
        return [(call.at_resolution(self.size).shape, call.layers) for call in calls]


def find_works(
    names: list[str], sizes: list[int], *, batch: int, largest: int, checkpoint_blocks: bool = False
) -> list[Work]:
    """The works of some names at some edges in pixels.

    Args:
        names: "MODEL-layers" or "MODEL-unet", where MODEL is what `find_unet` takes, or "calls": attention without
            projections, with masks, in odd shapes and so on.
        sizes: edges of the image.
        batch: items.
        largest: of a model's layers, how many kinds, from the largest on.
        checkpoint_blocks: of the UNets.

    Raises:
        UserError: a name or a size that does not exist.
    """
    works: list[Work] = []
    for name in names:
        if name == CALLS:
            works += calls_of(sizes)
            continue
        model, _, part = name.rpartition("-")
        if part not in ("layers", "unet"):
            raise UserError(f"--work: expected such as {', '.join(WORK_NAMES)}; got {name!r}. Correct the name.")
        source = find_unet(model)
        if wrong := [size for size in sizes if size < source.resolution_step or size % source.resolution_step]:
            raise UserError(
                f"--resolution: expected multiples of {source.resolution_step} pixels, which {model} halves down to "
                f"whole latents; got {wrong[0]}. Take one of these."
            )
        if part == "unet":
            works += [UnetWork(model, size, batch, checkpoint_blocks) for size in sizes]
            continue
        calls = record_attention_calls(model, batch=batch, itemsize=4)[:largest]
        works += [_layer_of(model, call.at_resolution(size)) for call in calls for size in sizes]
    return works


def _layer_of(model: str, call: LayersAlike) -> LayerWork:
    """The layer around a call of a UNet, in which channels are heads times head dim."""
    shape, own = call.shape, call.is_self_attention
    tokens = "self" if own else f"{shape.keys} tokens"
    inner = shape.heads * shape.head_dim
    text_width = find_unet(model).config.get("cross_attention_dim", inner)
    scale = call.pixels // math.isqrt(shape.queries)  # of the image's edge to that of this layer's tokens
    return LayerWork(
        f"{Path(model).name} {shape.heads}x{shape.head_dim} {tokens} at 1/{scale}",
        call.pixels,
        shape.batch,
        shape.queries,
        inner,
        shape.heads,
        shape.head_dim,
        None if own else (shape.keys, text_width),
    )


def _exact_layer(path: str, layer: nn.Module | None, inputs: tuple[Tensor, ...]) -> Exact:
    """Attention of some rows of the first input to the last, which is what looking at all of them gives these rows."""
    if layer is None:
        raise TypeError("REFERENCE: expected a peer for layers and UNets.")
    rows = some_rows(inputs[0].shape[1])
    with torch.no_grad():
        return Exact(path, inputs, rows, layer(inputs[0][:, rows].double(), inputs[-1].double()))
