"""Swaps a whole module: one of slicemod's takes its place, with the parts, hooks and mode of the original."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from slicemod.adapters.known_code import KNOWN, forward_methods, is_known
from slicemod.adapters.own_code import ACCELERATE, altered, copy_accelerate_hook, replaced_function
from slicemod.config import SliceConfig

_ORIGINAL = "_slicemod_original"


class ReplacingHost(ABC):
    """A `Host` that replaces whole modules. A swapped layer holds the original, and is known by this."""

    name: str
    role: str = "attention"
    parts: tuple[str, ...]  # the submodules that both have
    known: Mapping[str, str] = KNOWN  # the codes of `forward` that need no doubt

    @abstractmethod
    def matches(self, original: nn.Module) -> bool:
        """Whether the original module is of this family."""

    @abstractmethod
    def misfit(self, module: nn.Module) -> str | None:
        """Why our module would compute something else than this one, judged by its parts; None if nothing shows it."""

    @abstractmethod
    def replacement(self, original: Any, slicing: SliceConfig) -> nn.Module:
        """A module of ours that computes the same as `original` after it got the original's parts."""

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module is of this family, or replaced one that is."""
        return self.matches(original_of(module))

    def obstacle(self, parent: nn.Module, child: str) -> str | None:
        """That somebody changed the layer or compiled it by itself, or that it holds more than its parts."""
        module = parent.get_submodule(child)
        if _compiled(parent, module):
            return "it was compiled by itself; compile it after the swap"
        return self._changed(module) or _more(module, self.parts) or self.misfit(module)

    def doubt(self, module: nn.Module) -> str | None:
        """That the layer's code is not known."""
        if is_known(type(module), self.known):
            return None
        return f"its class {type(module).__qualname__} has a forward that slicemod does not know"

    def holder(self, module: nn.Module) -> nn.Module | None:
        """The module itself, if it is swapped."""
        return module if _ORIGINAL in vars(module) else None

    def attends(self, module: nn.Module) -> str:
        """The layer's class."""
        return type(module).__name__

    def replaced(self, module: nn.Module) -> str:
        """The original's class."""
        return type(original_of(module)).__name__

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> nn.Module:
        """Put a module with the same parts in the place of the layer."""
        original = parent.get_submodule(child)
        with torch.device("meta"):  # its own parts are never used, so they take no memory
            swapped = self.replacement(original, slicing)
        self._hand_over(original, swapped)
        # Not by setattr, which would register the original as a child and add its keys to the state dict.
        vars(swapped)[_ORIGINAL] = original
        setattr(parent, child, swapped)
        return swapped

    def restore(self, parent: nn.Module, child: str) -> str | None:
        """Put the original back, with the parts as they are now. For example, LoRA may have wrapped some meanwhile."""
        swapped = parent.get_submodule(child)
        original = original_of(swapped)
        lost = self._changed(swapped)
        if _compiled(parent, swapped):
            lost = "it was compiled by itself, and what was compiled runs until it is compiled again"
        self._hand_over(swapped, original)
        setattr(parent, child, original)
        return lost

    def forget(self, module: nn.Module) -> bool:
        """False, because a module that others put in the place of ours has no note of the swap."""
        return False

    def _changed(self, module: nn.Module) -> str | None:
        """That somebody changed what the layer computes. Hooks of accelerate are allowed."""
        kind = type(module)
        methods = forward_methods(kind) or ["forward"]
        changed = altered(module, methods, hooks=(ACCELERATE,))
        return changed or _other_functions(kind, methods if is_known(kind, self.known) else ())

    def _hand_over(self, source: nn.Module, target: nn.Module) -> None:
        """Give `target` the parts, the mode and the hooks of `source`.

        The dicts of hooks stay the same objects, so that the handles of hooks stay valid.
        """
        for part in self.parts:
            setattr(target, part, source.get_submodule(part))
        self._hand_over_hooks(source, target)

    def _hand_over_hooks(self, source: nn.Module, target: nn.Module) -> None:
        target.training = source.training
        vars(target).update({name: value for name, value in vars(source).items() if "_hook" in name})
        copy_accelerate_hook(source, target)


def original_of(module: nn.Module) -> nn.Module:
    """The module that this one replaced; the module itself, if it replaced none."""
    original: nn.Module = vars(module).get(_ORIGINAL, module)
    return original


def _compiled(parent: nn.Module, module: nn.Module) -> bool:
    """The module itself was compiled. Its compiled code would go on calling it, and not what takes its place."""
    return type(parent).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _other_functions(kind: type, methods: Iterable[str]) -> str | None:
    """That somebody replaced a function that known code calls."""
    replaced = (replaced_function(kind, name) for name in methods)
    return next((reason for reason in replaced if reason is not None), None)


def _more(module: nn.Module, parts: tuple[str, ...]) -> str | None:
    """That a module holds more than `parts`, and so may compute something else. None if it does not."""
    more = [name for name, _ in module.named_children() if name not in parts]
    more += [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    return f"it holds {', '.join(more)} besides {', '.join(parts)}" if more else None
