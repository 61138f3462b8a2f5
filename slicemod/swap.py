"""Replaces the attention in other people's models by slicemod's, and restores it. On request other layers too.

A `Host` knows one family of layers. Each file in `adapters/` registers its host here. `swap_attention` walks
the model, asks the hosts about each layer, and reports. The projections are reused, so state dict keys, optimizers and
averaged weights stay valid. A swapped layer holds what it replaced, so that a copy or a pickle of the model can be
restored too.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from torch import nn

from slicemod.config import SliceConfig
from slicemod.feed_forward.plan import FeedForwardPlan
from slicemod.plan import SlicePlan
from slicemod.vae.plan import StripPlan


class Host(Protocol):
    """One family of layers."""

    name: str
    role: str  # "attention", "feed-forward" or "VAE half"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module is a layer of this family, swapped or not."""

    def holder(self, module: nn.Module) -> Any:
        """The object that holds `slicing` and `plan` of a swapped layer; None if the layer is not swapped."""

    def replaced(self, module: nn.Module) -> str:
        """The name of the class that was replaced in a swapped layer: of a module, or of a processor."""

    def attends(self, module: nn.Module) -> str:
        """The name of the class that computes the layer's attention now: of a module, or of a processor."""

    def obstacle(self, parent: nn.Module, child: str) -> str | None:
        """Why this layer, which is not swapped, cannot be swapped; None if it can."""

    def doubt(self, module: nn.Module) -> str | None:
        """Why this layer is swapped only if `filter_fn` chooses it; None if it is known to be plain attention."""

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> Any:
        """Swap the layer, and return its holder."""

    def restore(self, parent: nn.Module, child: str) -> str | None:
        """Give the swapped layer its own attention back.

        Returns:
            What others had changed on our object, which is lost with it; None if there is nothing.
        """

    def forget(self, module: nn.Module) -> bool:
        """Whether a layer that is not swapped now still has a note that it once was. The note is removed."""


HOSTS: list[Host] = []
_ANY_MODEL = "sliced_sdpa(...).install(model) slices what any model calls F.scaled_dot_product_attention for."
_PLURALS = {"attention": "attention layers", "feed-forward": "feed-forwards", "VAE half": "VAE halves"}
# The files of `adapters/` that register a host; they are loaded when a model is first walked.
HOST_MODULES = ("attn_block", "compvis", "diffusers_host", "feed_forward", "lookalikes", "sd_scripts", "vae")


@dataclass(frozen=True)
class SwappedLayer:
    """One swapped layer.

    Attributes:
        name: its path in the model.
        host: the name of its host.
        role: "attention", "feed-forward" or "VAE half".
        replaced: the name of the class of the module or processor that was replaced.
        slicing: its settings.
        holder: the object that holds its plan.
        before: the settings that it had before this swap; None if it had its own attention.
    """

    name: str
    host: str
    role: str
    replaced: str
    slicing: SliceConfig
    holder: Any
    before: SliceConfig | None = None

    @property
    def plan(self) -> SlicePlan | FeedForwardPlan | StripPlan | None:
        """The plan of the layer's last eager call."""
        plan: SlicePlan | FeedForwardPlan | StripPlan | None = self.holder.plan
        return plan


@dataclass(frozen=True)
class SwapReport:
    """What `swap_attention` did: the layers that it swapped, and the layers that it left alone, with the reason.

    As a context manager it undoes the swap at the end: `with swap_attention(model): ...`

    Some functions change processors or modules after a swap, such as diffusers' `set_attn_processor`,
    `set_attention_slice` and `fuse_qkv_projections`. Layers that they changed are no longer swapped; `check` names
    them.

    Attributes:
        layers: the swapped layers.
        skipped: path and reason of each layer that was left alone.
        model: the model.
    """

    layers: tuple[SwappedLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    model: nn.Module = field(repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"swapped {_counted(self.layers)} ({self.layers[0].slicing}), skipped {len(self.skipped)}"]
        for layer in self.layers:
            plan = "" if layer.plan is None else f"; last plan: {layer.plan}"
            lines.append(f"  {layer.name} ({layer.host}): {layer.replaced} -> {type(layer.holder).__name__}{plan}")
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped]
        lines += [f"  {name}: no longer swapped, {reason}" for name, reason in self._lost()]
        return "\n".join(lines)

    @property
    def attention_plans(self) -> dict[str, SlicePlan]:
        """The plan of each attention layer's last eager call, by the layer's name."""
        return {layer.name: layer.plan for layer in self.layers if isinstance(layer.plan, SlicePlan)}

    def check(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of each layer that is no longer swapped, or not with these settings. Warns of them."""
        lost = self._lost()
        if lost:
            warnings.warn(
                f"{len(lost)} of {len(self.layers)} layers that were swapped are so no longer: {_in_short(lost)}. "
                "Swap again after whatever changes layers or their processors.",
                stacklevel=2,
            )
        return lost

    def _lost(self) -> tuple[tuple[str, str], ...]:
        present = {name: (host, parent.get_submodule(child)) for name, parent, child, host in _layers(self.model)}
        lost = []
        for layer in self.layers:
            if layer.name not in present:
                lost.append((layer.name, f"no known {layer.role} is there"))
                continue
            host, module = present[layer.name]
            holder = host.holder(module)
            if holder is None:
                lost.append((layer.name, f"its attention is that of {host.attends(module)}"))
            elif holder is not layer.holder and holder.slicing != layer.slicing:
                lost.append((layer.name, f"its {host.attends(module)} was made anew, with {holder.slicing}"))
        return tuple(lost)

    def __enter__(self) -> SwapReport:
        return self

    def __exit__(self, *raised: object) -> None:
        before = {id(layer.holder): layer.before for layer in reversed(self.layers)}
        names = {layer.name for layer in self.layers if layer.before is None}

        def undo(name: str, holder: Any) -> bool:
            slicing = before.get(id(holder))
            if slicing is not None:
                holder.slicing = slicing
                return False
            return id(holder) in before or (holder is None and name in names)

        _restore(self.model, undo, stacklevel=3)


def swap_attention(
    model: nn.Module,
    slicing: SliceConfig | Mapping[str, Any] | None = None,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    feed_forward: bool = False,
) -> SwapReport:
    """Make the attention layers of `model` compute within a memory budget, and on request its feed-forwards.

    Parameters, state dict keys, hooks and modes stay as they are.

    Args:
        model: a UNet, a VAE, or any model with attention layers that a host recognises. It is changed in place. A
            second swap only changes the settings.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.
        filter_fn: takes the path and the module of a layer, and says whether to swap it. Some layers are swapped only
            if it chooses them: modules of unknown classes with `to_q`, `to_k`, `to_v`, `to_out` and `heads` that are
            called as CrossAttention is, and classes with a known name but unknown code. You then have to know that
            they compute softmax attention and nothing more.
        feed_forward: swap the feed-forwards of the model too. They compute some tokens at a time within the same
            budget, and in training they compute them again in the backward pass.

    Returns:
        What was swapped, and what was skipped and why. Skipped are layers that hold or do more than plain attention,
        and layers whose code somebody replaced. In a `with` statement it undoes the swap at the end.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no attention layer that can be swapped.

    Warns:
        UserWarning: some layers were swapped, and others could not be, though `filter_fn` did not leave them out.
    """
    roles = ("attention", "feed-forward") if feed_forward else ("attention",)
    return _swap(model, SliceConfig.of(slicing), roles, filter_fn)


def swap_vae(vae: nn.Module, budget: int | float | str = "auto") -> SwapReport:
    """Make a VAE encode and decode a strip of rows at a time, with the results that it has without.

    Group norm has the statistics of the whole image, and a convolution the rows of the neighbouring strips, so there
    are no seams. Its attention is swapped as by `swap_attention`. Parameters, state dict keys and hooks of the encoder,
    the decoder and the convolutions stay. Where gradients are needed, the VAE computes as before.

    Args:
        vae: diffusers' `AutoencoderKL` or CompVis LDM's. It is changed in place. `restore_attention` undoes it.
        budget: what a strip may take beside the input and the output of its layer, and what the attention may; in the
            forms of `SliceConfig.budget`. "auto" is as much as runs at full speed.

    Returns:
        What was swapped, and what was skipped and why. In a `with` statement it undoes the swap at the end.

    Raises:
        TypeError: the VAE is not a module.
        ValueError: it has neither encoder nor decoder that can be swapped.

    Warns:
        UserWarning: a part was swapped and another could not be.
    """
    slicing = SliceConfig(budget=budget)
    halves = _swap(vae, slicing, ("VAE half",), None)
    attention = _swap(vae, slicing, ("attention",), None, required=False)
    return SwapReport(halves.layers + attention.layers, halves.skipped + attention.skipped, vae)


def _swap(
    model: nn.Module,
    slicing: SliceConfig,
    roles: Sequence[str],
    filter_fn: Callable[[str, nn.Module], bool] | None,
    *,
    required: bool = True,
) -> SwapReport:
    layers, skipped, refused = [], [], []
    for name, parent, child, host in _layers(model, roles):
        module = parent.get_submodule(child)
        holder = host.holder(module)
        if filter_fn is not None and not filter_fn(name, module):
            skipped.append((name, "filter_fn said no"))
            continue
        reason = None if holder is not None else host.obstacle(parent, child)
        if reason is None and holder is None and filter_fn is None:
            doubt = host.doubt(module)
            reason = None if doubt is None else f"{doubt}; choose it with filter_fn"
        if reason is not None:
            skipped.append((name, reason))
            refused.append((name, reason))
        else:
            before = None if holder is None else holder.slicing
            if holder is None:
                holder = host.swap(parent, child, slicing)
            holder.slicing = slicing
            replaced = host.replaced(parent.get_submodule(child))
            layers.append(SwappedLayer(name, host.name, host.role, replaced, slicing, holder, before))
    if required and not layers:
        reasons = "".join(f" {name}: {reason}." for name, reason in skipped[:5])
        raise ValueError(
            f"model: expected {' or '.join(_PLURALS[role] for role in roles)} of "
            f"{', '.join(host.name for host in HOSTS if host.role in roles)}; found "
            f"{'only such as cannot be swapped' if skipped else 'none'} in {type(model).__name__}."
            f"{reasons + ' ' + _ANY_MODEL if reasons else ' ' + _what_to_pass(model)}"
        )
    if refused:
        warnings.warn(
            f"{type(model).__name__} was swapped in part: {_counted(layers)} were, {len(refused)} were "
            f"left as they are and take the memory they took: {_in_short(refused)}. The report has all of them; leave "
            "them out by filter_fn to swap the others without this warning.",
            stacklevel=3,
        )
    return SwapReport(tuple(layers), tuple(skipped), model)


def restore_attention(model: nn.Module) -> int:
    """Give every swapped layer of `model` its own attention back, the very same object.

    Returns:
        How many layers were restored.

    Raises:
        TypeError: the model is not a module.

    Warns:
        UserWarning: others changed layers after the swap. Processors that they set stay. What they changed on a module
            of slicemod is lost with that module.
    """
    return _restore(model, lambda name, holder: True, stacklevel=3)


def _restore(model: nn.Module, chosen: Callable[[str, Any], bool], stacklevel: int) -> int:
    """Restore the layers that `chosen(name, holder)` takes. The holder of a layer that is not swapped is None."""
    restored, changed = 0, []
    for name, parent, child, host in _layers(model):
        module = parent.get_submodule(child)
        holder = host.holder(module)
        if not chosen(name, holder):
            continue
        if holder is not None:
            lost = host.restore(parent, child)
            restored += 1
            if lost is not None:
                changed.append((name, f"restored, though {lost}"))
        elif host.forget(module):
            changed.append((name, f"not restored, its attention is that of {host.attends(module)}"))
    if changed:
        warnings.warn(
            f"{len(changed)} layers of {type(model).__name__} were changed after they were swapped: "
            f"{_in_short(changed)}. Undo such changes before restoring, in the opposite order of making them.",
            stacklevel=stacklevel,
        )
    return restored


def _in_short(layers: Sequence[tuple[str, str]]) -> str:
    """Names grouped by what is said of them. Names that differ only in numbers become the first and the last one."""
    alike: dict[str, dict[str, list[str]]] = {}
    for name, reason in layers:
        alike.setdefault(reason, {}).setdefault(re.sub(r"\d+", "", name), []).append(name)
    return "; ".join(
        ", ".join(f"{found[0]} to {found[-1]} ({len(found)})" if found[1:] else found[0] for found in roles.values())
        + f": {reason}"
        for reason, roles in alike.items()
    )


def _counted(layers: Sequence[SwappedLayer]) -> str:
    """How many layers of each role there are."""
    numbers = Counter(layer.role for layer in layers)
    return " and ".join(f"{numbers[role]} {_PLURALS[role]}" for role in _PLURALS if role in numbers) or "no layers"


def _layers(model: nn.Module, roles: Container[str] = _PLURALS) -> list[tuple[str, nn.Module, str, Host]]:
    """Path, parent, name and host of every layer of these roles below `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}. {_what_to_pass(model)}")
    for name in HOST_MODULES:
        import_module(f"slicemod.adapters.{name}")
    found = []
    for path, parent in model.named_modules():
        for child, module in vars(parent)["_modules"].items():  # named_children leaves out a module that occurs twice
            host = None if module is None else _host(module)
            if host is not None and host.role in roles:
                found.append((f"{path}.{child}" if path else child, parent, child, host))
    return found


def _host(module: nn.Module) -> Host | None:
    """The host of a layer. If several hosts recognise it, one without doubts is taken."""
    hosts = [host for host in HOSTS if host.recognises(module)]
    return min(hosts, key=lambda host: host.doubt(module) is not None, default=None)


def _what_to_pass(owner: object) -> str:
    """Advice what to pass instead: the modules with attention in a pipeline, or in a LightningModule that has one."""
    inner = {name: part for name, part in getattr(owner, "__dict__", {}).items() if not name.startswith("_")}
    names = [name for name, part in inner.items() if isinstance(part, nn.Module) and _layers(part)]
    for name, part in inner.items():
        of_part = {} if isinstance(part, nn.Module) else getattr(part, "__dict__", {})
        names += [f"{name}.{inmost}" for inmost, m in of_part.items() if isinstance(m, nn.Module) and _layers(m)]
    if names:
        return f"Pass its {' or '.join(names)}."
    return (
        "Pass the UNet, transformer, ControlNet or VAE itself, a LightningModule once it has made its model. "
        f"{_ANY_MODEL}"
    )
