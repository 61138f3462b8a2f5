"""Swapping the attention of a model that others wrote for ours, and back.

A `Host` knows one family of attention layers; the adapters register theirs. `swap_attention` walks the model, asks
the hosts, and reports. Projections are reused, so state dict keys, optimizers and EMA stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from slicemod.plan import SlicePlan
from slicemod.slice_config import SliceConfig


class Host(Protocol):
    """One family of attention layers."""

    name: str

    def recognises(self, module: nn.Module) -> bool:
        """The module is an attention layer of this family, swapped or not."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why this layer cannot be swapped, or None."""

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> Any:
        """Swap the layer, or set `slicing` where it is swapped already; return what holds its `plan`."""

    def restore(self, parent: nn.Module, child: str) -> bool:
        """Give the layer its own attention back; False where it was not swapped."""


HOSTS: list[Host] = []


@dataclass(frozen=True)
class SwappedLayer:
    """One swapped layer: its path in the model, its host's name, its settings, and what holds its plan."""

    name: str
    host: str
    slicing: SliceConfig
    holder: Any

    @property
    def plan(self) -> SlicePlan | None:
        """The plan of the layer's last eager call."""
        plan: SlicePlan | None = self.holder.plan
        return plan


@dataclass(frozen=True)
class SwapReport:
    """What `swap_attention` did: the layers it swapped, and those it left alone with the reason why."""

    layers: tuple[SwappedLayer, ...]
    skipped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"swapped {len(self.layers)} attention layers, skipped {len(self.skipped)}"]
        for layer in self.layers:
            plan = "" if layer.plan is None else f"; last plan: {layer.plan}"
            lines.append(f"  {layer.name} ({layer.host}): {layer.slicing}{plan}")
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def swap_attention(
    model: nn.Module,
    slicing: SliceConfig | Mapping[str, Any] | None = None,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> SwapReport:
    """Compute the attention of `model` in slices. Parameters, state dict keys, hooks and modes stay as they are.

    Args:
        model: a UNet, VAE or any model with attention layers that a host recognises. Swapped in place; a second
            swap only changes the settings.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.
        filter_fn: given a layer's path and module, whether to swap it.

    Returns:
        What was swapped, and what was skipped and why.

    Raises:
        ValueError: the model has no attention layer to swap.
    """
    slicing = SliceConfig.of(slicing)
    layers, skipped = [], []
    for name, parent, child, host in _attention_layers(model):
        module = parent.get_submodule(child)
        if filter_fn is not None and not filter_fn(name, module):
            skipped.append((name, "filter_fn said no"))
        elif (obstacle := host.obstacle(module)) is not None:
            skipped.append((name, obstacle))
        else:
            layers.append(SwappedLayer(name, host.name, slicing, host.swap(parent, child, slicing)))
    if not layers:
        reasons = "".join(f" {name}: {reason}." for name, reason in skipped[:5])
        raise ValueError(
            f"model: expected attention layers of {', '.join(host.name for host in HOSTS)}; found "
            f"{'none' if not skipped else 'only such as cannot be swapped'} in {type(model).__name__}.{reasons} "
            "Pass the UNet or VAE itself, not a pipeline."
        )
    return SwapReport(tuple(layers), tuple(skipped))


def restore_attention(model: nn.Module) -> int:
    """Give every swapped layer of `model` its own attention back, the very same object; return how many."""
    return sum(host.restore(parent, child) for _, parent, child, host in _attention_layers(model))


def _attention_layers(model: nn.Module) -> list[tuple[str, nn.Module, str, Host]]:
    """Path, parent, name and host of every attention layer below `model`."""
    return [
        (f"{path}.{child}" if path else child, parent, child, host)
        for path, parent in model.named_modules()
        for child, module in vars(parent)["_modules"].items()  # named_children leaves out what occurs twice
        for host in HOSTS
        if module is not None and host.recognises(module)
    ]
