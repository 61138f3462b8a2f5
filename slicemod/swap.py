"""Swapping the attention of a model that others wrote for ours, and back.

A `Host` knows one family of attention layers; the adapters register theirs. `swap_attention` walks the model, asks
the hosts, and reports. Projections are reused, so state dict keys, optimizers and EMA stay valid. A swapped layer holds
what it replaced, so that copies and pickles of a model can be restored on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from slicemod.plan import SlicePlan
from slicemod.slice_config import SliceConfig


class Host(Protocol):
    """One family of attention layers."""

    name: str
    guessed: bool  # known by its parts alone: swapped only where `filter_fn` chooses it

    def recognises(self, module: nn.Module) -> bool:
        """The module is an attention layer of this family, swapped or not."""

    def holder(self, module: nn.Module) -> Any:
        """What holds `slicing` and `plan` of a swapped layer; None where the layer is not swapped."""

    def replaced(self, module: nn.Module) -> str:
        """The class of the module or processor in whose place ours is, in a swapped layer."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why this layer, which is not swapped, cannot be; None where it can."""

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> Any:
        """Swap the layer; return its holder."""

    def restore(self, parent: nn.Module, child: str) -> None:
        """Give the swapped layer its own attention back."""


HOSTS: list[Host] = []


@dataclass(frozen=True)
class SwappedLayer:
    """One swapped layer: its path in the model, its host's name, its settings, what holds its plan.

    `replaced` is the class of the module or processor whose place ours took; `before` are the settings that the layer
    had before, None where it had its own attention.
    """

    name: str
    host: str
    replaced: str
    slicing: SliceConfig
    holder: Any
    before: SliceConfig | None = None

    @property
    def plan(self) -> SlicePlan | None:
        """The plan of the layer's last eager call."""
        plan: SlicePlan | None = self.holder.plan
        return plan


@dataclass(frozen=True)
class SwapReport:
    """What `swap_attention` did: the layers it swapped, and those it left alone with the reason why.

    As a context manager it undoes this on leaving: `with swap_attention(model): ...`
    """

    layers: tuple[SwappedLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    model: nn.Module = field(repr=False, compare=False)

    def __str__(self) -> str:
        swapped = f"swapped {len(self.layers)} attention layers ({self.layers[0].slicing})"
        lines = [f"{swapped}, skipped {len(self.skipped)}"]
        for layer in self.layers:
            plan = "" if layer.plan is None else f"; last plan: {layer.plan}"
            lines.append(f"  {layer.name} ({layer.host}): {layer.replaced} -> {type(layer.holder).__name__}{plan}")
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped]
        return "\n".join(lines)

    def __enter__(self) -> SwapReport:
        return self

    def __exit__(self, *raised: object) -> None:
        before = {id(layer.holder): layer.before for layer in reversed(self.layers)}
        for _, parent, child, host in _attention_layers(self.model):
            holder = host.holder(parent.get_submodule(child))
            if id(holder) not in before:
                continue
            slicing = before[id(holder)]
            if slicing is None:
                host.restore(parent, child)
            else:
                holder.slicing = slicing


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
        filter_fn: given a layer's path and module, whether to swap it. Modules of unknown classes that have `to_q`,
            `to_k`, `to_v`, `to_out` and `heads`, and are called as CrossAttention is, are swapped only where it
            chooses them: that they compute softmax attention and nothing more is for you to know.

    Returns:
        What was swapped, and what was skipped and why. Used in a `with` statement, it undoes the swap on leaving.

    Raises:
        TypeError: the model is no module.
        ValueError: the model has no attention layer to swap.
    """
    slicing = SliceConfig.of(slicing)
    layers, skipped = [], []
    for name, parent, child, host in _attention_layers(model):
        module = parent.get_submodule(child)
        holder = host.holder(module)
        obstacle = None if holder is not None else host.obstacle(module)
        if filter_fn is not None and not filter_fn(name, module):
            skipped.append((name, "filter_fn said no"))
        elif obstacle is not None:
            skipped.append((name, obstacle))
        elif holder is None and host.guessed and filter_fn is None:
            skipped.append((name, f"{type(module).__name__} only looks like attention; choose it with filter_fn"))
        else:
            before = None if holder is None else holder.slicing
            if holder is None:
                holder = host.swap(parent, child, slicing)
            holder.slicing = slicing
            replaced = host.replaced(parent.get_submodule(child))
            layers.append(SwappedLayer(name, host.name, replaced, slicing, holder, before))
    if not layers:
        reasons = "".join(f" {name}: {reason}." for name, reason in skipped[:5])
        raise ValueError(
            f"model: expected attention layers of {', '.join(host.name for host in HOSTS)}; found "
            f"{'none' if not skipped else 'only such as cannot be swapped'} in {type(model).__name__}.{reasons} "
            "Pass the UNet or VAE itself, not a pipeline."
        )
    return SwapReport(tuple(layers), tuple(skipped), model)


def restore_attention(model: nn.Module) -> int:
    """Give every swapped layer of `model` its own attention back, the very same object; return how many."""
    restored = 0
    for _, parent, child, host in _attention_layers(model):
        if host.holder(parent.get_submodule(child)) is not None:
            host.restore(parent, child)
            restored += 1
    return restored


def _attention_layers(model: nn.Module) -> list[tuple[str, nn.Module, str, Host]]:
    """Path, parent, name and host of every attention layer below `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module; got {type(model).__name__}. Pass a pipeline's unet, controlnet or vae."
        )
    found = []
    hosts = sorted(HOSTS, key=lambda host: host.guessed)
    for path, parent in model.named_modules():
        for child, module in vars(parent)["_modules"].items():  # named_children leaves out what occurs twice
            host = next((host for host in hosts if module is not None and host.recognises(module)), None)
            if host is not None:
                found.append((f"{path}.{child}" if path else child, parent, child, host))
    return found
