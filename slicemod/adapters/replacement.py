"""Swapping a whole module: one of ours takes a layer's place, with the layer's own parts, hooks and mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from slicemod.adapters.known_code import forward_methods, is_known
from slicemod.adapters.own_code import ACCELERATE, altered, copy_accelerate_hook, replaced_function
from slicemod.config import SliceConfig

_ORIGINAL = "_slicemod_original"


class ReplacingHost(ABC):
    """A `Host` whose layers are replaced. A swapped layer is known by the original that it holds."""

    name: str
    parts: tuple[str, ...]  # the submodules that both have

    @abstractmethod
    def matches(self, original: nn.Module) -> bool:
        """The module, as its authors made it, is of this family."""

    @abstractmethod
    def misfit(self, module: nn.Module) -> str | None:
        """Why ours would not compute what this layer does, as far as its parts show; None where they do not."""

    @abstractmethod
    def replacement(self, original: Any, slicing: SliceConfig) -> nn.Module:
        """A module of ours that computes what `original` does, once it has its parts."""

    def recognises(self, module: nn.Module) -> bool:
        """The module is of this family, or in the place of one that is."""
        return self.matches(vars(module).get(_ORIGINAL, module))

    def obstacle(self, parent: nn.Module, child: str) -> str | None:
        """A layer that somebody changed or compiled by itself, or that holds more than its parts, is left alone."""
        module = parent.get_submodule(child)
        if _compiled(parent, module):
            return "it was compiled by itself; compile it after the swap"
        return _changed(module) or _more(module, self.parts) or self.misfit(module)

    def doubt(self, module: nn.Module) -> str | None:
        """That the layer's code is not known."""
        if is_known(type(module)):
            return None
        return f"its class {type(module).__qualname__} has a forward that slicemod does not know"

    def holder(self, module: nn.Module) -> nn.Module | None:
        """The module itself where it is one of ours."""
        return module if _ORIGINAL in vars(module) else None

    def attends(self, module: nn.Module) -> str:
        """The layer's class."""
        return type(module).__name__

    def replaced(self, module: nn.Module) -> str:
        """The original's class."""
        return type(vars(module)[_ORIGINAL]).__name__

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> nn.Module:
        """Put a module with the same parts in the layer's place."""
        original = parent.get_submodule(child)
        with torch.device("meta"):  # parts of its own are never used
            swapped = self.replacement(original, slicing)
        self._hand_over(original, swapped)
        # Not through setattr: as a registered child it would double the keys of the state dict.
        vars(swapped)[_ORIGINAL] = original
        setattr(parent, child, swapped)
        return swapped

    def restore(self, parent: nn.Module, child: str) -> str | None:
        """Put the layer itself back, with the parts as they are now: LoRA may have wrapped some meanwhile."""
        swapped = parent.get_submodule(child)
        original: nn.Module = vars(swapped)[_ORIGINAL]
        lost = _changed(swapped)
        if _compiled(parent, swapped):
            lost = "it was compiled by itself, and what was compiled runs until it is compiled again"
        self._hand_over(swapped, original)
        setattr(parent, child, original)
        return lost

    def forget(self, module: nn.Module) -> bool:
        """A layer that others put in the place of ours knows nothing of it."""
        return False

    def _hand_over(self, source: nn.Module, target: nn.Module) -> None:
        """Parts, mode and hooks; the same dicts of hooks, so that their handles stay valid."""
        for part in self.parts:
            setattr(target, part, source.get_submodule(part))
        target.training = source.training
        vars(target).update({name: value for name, value in vars(source).items() if "_hook" in name})
        copy_accelerate_hook(source, target)


def _compiled(parent: nn.Module, module: nn.Module) -> bool:
    """`torch.compile` made a function of this very module, which calls no other in its place."""
    return type(parent).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _changed(module: nn.Module) -> str | None:
    """That somebody changed what the layer computes, other than by a hook of accelerate."""
    methods = forward_methods(type(module)) or ["forward"]
    return altered(module, methods, hooks=(ACCELERATE,)) or _other_functions(type(module), methods)


def _other_functions(kind: type, methods: Iterable[str]) -> str | None:
    """That a function which known code calls is not the one that it was written with."""
    replaced = (replaced_function(kind, name) for name in (methods if is_known(kind) else ()))
    return next((reason for reason in replaced if reason is not None), None)


def _more(module: nn.Module, parts: tuple[str, ...]) -> str | None:
    """That a module holds more than `parts`, and so computes something else; None where it does not."""
    more = [name for name, _ in module.named_children() if name not in parts]
    more += [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    return f"it holds {', '.join(more)} besides {', '.join(parts)}" if more else None
