"""What one step allocates and frees, in order. It is recorded once; the peak is then a sum over whole numbers.

The recorder sees every operator. It notes when the storage of a result is made, and when its last reference is gone. On
the device "meta" nothing is allocated, but storages live exactly as long as in the real step. The memory of attention
itself is left open: a timeline has places for it, and `Timeline.peak` fills in the bytes of one way to compute it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicemod.torch_internals import TorchDispatchMode, tree_leaves

# A function from an operator, its arguments and its result to the bytes that it allocates beyond its results and frees
# again. Several numbers if one follows the other.
Temporaries = Callable[[Any, Sequence[Any], Any], Sequence[int]]


class AttentionCost(NamedTuple):
    """Bytes that an attention call keeps from forward to backward, and bytes that it needs on top while it runs."""

    kept: int
    working: int


class StepPeak(NamedTuple):
    """The bytes that are held at the peak of a step, by what they are for.

    `weights` are those that are loaded at that moment.
    `activations` are all tensors that are not in the other fields, and the temporary memory of operators.
    """

    weights: int
    activations: int
    gradients: int
    optimizer: int
    attention: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


@dataclass(frozen=True)
class Timeline:
    """One step as rows of whole numbers, in the order of events.

    Attributes:
        activations, gradients, loaded: bytes that a row allocates, negative if it frees them, `(E,)` int64. Weights are
            `loaded` where they come and go while the step runs.
        temporaries: bytes that are allocated and freed within a row, `(E,)` int64.
        calls: the number of the attention call of a row, or -1, `(E,)` int64.
        keeps: 1 in the row where the call allocates what it keeps, -1 where this is freed, `(E,)` int64.
        works: 1 in the rows where the call runs, `(E,)` int64.
        weights, optimizer: bytes that are held all the time.
    """

    activations: Tensor
    gradients: Tensor
    loaded: Tensor
    temporaries: Tensor
    calls: Tensor
    keeps: Tensor
    works: Tensor
    weights: int
    optimizer: int

    def peak(self, costs: Sequence[AttentionCost]) -> StepPeak:
        """The peak of the step if the attention calls take `costs`."""
        kept, working = torch.tensor([*costs, (0, 0)]).unbind(1)  # index -1 is the added (0, 0): no call
        attention = (self.keeps * kept[self.calls]).cumsum(0) + self.works * working[self.calls]  # (E,)
        activations = self.activations.cumsum(0) + self.temporaries
        gradients, loaded = self.gradients.cumsum(0), self.loaded.cumsum(0)
        most = int((activations + gradients + loaded + attention).argmax())
        weights = self.weights + int(loaded[most])
        return StepPeak(weights, int(activations[most]), int(gradients[most]), self.optimizer, int(attention[most]))

    def held_at_attention(self, costs: Sequence[AttentionCost]) -> int:
        """The most bytes that the rest of the step holds while an attention call runs. Other calls keep `costs`."""
        kept = torch.tensor([*(cost.kept for cost in costs), 0])[self.calls]
        held = (self.activations + self.gradients + self.loaded + self.keeps * kept).cumsum(0) - self.works * kept
        return self.weights + self.optimizer + int(torch.where(self.works == 1, held, 0).max())

    def has_the_rows_of(self, other: Timeline) -> bool:
        """Whether both timelines record the same operators, of any sizes."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in ("calls", "keeps", "works"))

    def between(self, other: Timeline, numerator: int, denominator: int) -> Timeline:
        """`self + (other - self) * numerator / denominator`, for two steps that differ only in sizes.

        Raises:
            ValueError: the steps do not have the same rows.
        """
        if not self.has_the_rows_of(other):
            raise ValueError(
                f"timelines: expected two of the same operators; got {len(self.calls)} and {len(other.calls)} rows. "
                "Trace the step at this size itself."
            )
        sizes = {
            name: getattr(self, name) + (getattr(other, name) - getattr(self, name)) * numerator // denominator
            for name in ("activations", "gradients", "temporaries")
        }
        return replace(self, **sizes)

    def with_temporaries(self, sizes: Mapping[int, int]) -> Timeline:
        """The same with other bytes that some rows allocate and free."""
        temporaries = self.temporaries.clone()
        temporaries[list(sizes)] = torch.tensor(list(sizes.values()), dtype=temporaries.dtype)
        return replace(self, temporaries=temporaries)


class _Row(NamedTuple):
    allocated: int = 0
    temporary: int = 0
    call: int = -1
    keeps: int = 0
    works: int = 0
    birth: int = -1  # the row that allocated what this one frees
    loaded: int = 0


class MemoryRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch left it without types
    """Records a timeline while it is entered.

    Args:
        temporaries: the temporary memory of operators.
    """

    def __init__(self, temporaries: Temporaries) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._temporaries = temporaries
        self._rows: list[_Row] = []
        self._births: dict[int, int] = {}  # of the storages that live, by id
        self._references: dict[int, weakref.ref[Any]] = {}
        self._gradients: set[int] = set()  # rows that allocated a gradient

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Does not count the storages of `tensors`, which exist already."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage(), birth=-1)

    def count_as_gradients(self, tensors: Iterable[Tensor]) -> None:
        """The storages of `tensors`, allocated while recording, are gradients."""
        self._gradients |= {self._births[id(tensor.untyped_storage())] for tensor in tensors}

    def keep_for_backward(self, marker: Tensor, call: int) -> None:
        """The tensor `marker`, which was just made, stands for what attention `call` keeps for its backward pass."""
        birth = self._births[id(marker.untyped_storage())]
        self._rows[birth] = _Row(call=call, keeps=1)

    def work(self, call: int) -> None:
        """Attention `call` runs now."""
        self._rows.append(_Row(call=call, works=1))

    def load(self, size: int) -> None:
        """Weights of `size` bytes are loaded now, or taken away if it is negative."""
        self._rows.append(_Row(loaded=size))

    def hold_for_a_while(self, size: int) -> int:
        """`size` bytes are allocated and freed now. Returns the number of the row."""
        self._rows.append(_Row(temporary=size))
        return len(self._rows) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._births:
                storage = tensor.untyped_storage()
                self._rows.append(_Row(storage.nbytes()))
                self._follow(storage, birth=len(self._rows) - 1)
        self._rows += [_Row(temporary=size) for size in self._temporaries(func, args, result)]
        return result

    def timeline(self, weights: int, optimizer: int) -> Timeline:
        """The timeline that was recorded."""
        allocated, temporaries, calls, keeps, works, births, loaded = torch.tensor(self._rows).unbind(1)
        own = torch.arange(len(births))
        gradient = torch.isin(torch.where(births < 0, own, births), torch.tensor(sorted(self._gradients)))
        return Timeline(
            torch.where(gradient, 0, allocated),
            torch.where(gradient, allocated, 0),
            loaded,
            temporaries,
            calls,
            keeps,
            works,
            weights,
            optimizer,
        )

    def _follow(self, storage: torch.UntypedStorage, birth: int) -> None:
        key = id(storage)
        self._births[key] = birth
        self._references[key] = weakref.ref(storage, lambda _: self._freed(key))

    def _freed(self, key: int) -> None:
        birth = self._births.pop(key)
        del self._references[key]
        if birth >= 0:
            born = self._rows[birth]
            self._rows.append(_Row(-born.allocated, call=born.call, keeps=-born.keeps, birth=birth))
