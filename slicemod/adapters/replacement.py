"""Swapping a whole module: one of ours takes a layer's place, with the layer's own parts, hooks and mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from slicemod.slice_config import SliceConfig

_ORIGINAL = "_slicemod_original"


class ReplacingHost(ABC):
    """A `Host` whose layers are replaced. A swapped layer is known by the original that it holds."""

    name: str
    parts: tuple[str, ...]  # the submodules that both have
    guessed = False

    @abstractmethod
    def matches(self, original: nn.Module) -> bool:
        """The module, as its authors made it, is of this family."""

    @abstractmethod
    def obstacle(self, module: nn.Module) -> str | None:
        """Why this layer cannot be swapped; None where it can."""

    @abstractmethod
    def replacement(self, original: Any, slicing: SliceConfig) -> nn.Module:
        """A module of ours that computes what `original` does, once it has its parts."""

    def recognises(self, module: nn.Module) -> bool:
        """The module is of this family, or in the place of one that is."""
        return self.matches(vars(module).get(_ORIGINAL, module))

    def holder(self, module: nn.Module) -> nn.Module | None:
        """The module itself where it is one of ours."""
        return module if _ORIGINAL in vars(module) else None

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

    def restore(self, parent: nn.Module, child: str) -> None:
        """Put the layer itself back, with the parts as they are now: LoRA may have wrapped some meanwhile."""
        swapped = parent.get_submodule(child)
        original: nn.Module = vars(swapped)[_ORIGINAL]
        self._hand_over(swapped, original)
        setattr(parent, child, original)

    def _hand_over(self, source: nn.Module, target: nn.Module) -> None:
        """Parts, mode and hooks; the same dicts of hooks, so that their handles stay valid."""
        for part in self.parts:
            setattr(target, part, source.get_submodule(part))
        target.training = source.training
        vars(target).update({name: value for name, value in vars(source).items() if "_hook" in name})


def extra_state(module: nn.Module, parts: tuple[str, ...]) -> str | None:
    """That a module holds more than `parts`, and so computes something else; None where it does not."""
    more = [name for name, _ in module.named_children() if name not in parts]
    more += [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if more:
        return f"it holds {', '.join(more)} besides {', '.join(parts)}"
    if "forward" in vars(module):
        return "its forward was replaced on the object itself, which a module in its place would not call"
    return None
