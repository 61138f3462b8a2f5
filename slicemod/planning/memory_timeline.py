"""What is allocated and freed in the course of one step, in order: recorded once, then a sum over ints.

The recorder sees every operator and notes when the storage of a result is made and when its last reference goes. On
the device "meta" nothing is allocated, yet storages live exactly as long as those of the real step. The attention's own
memory is left open: a timeline has places for it, and `Timeline.peak` fills in what one way to compute it takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicemod.torch_internals import TorchDispatchMode, tree_leaves

# Bytes that an operator allocates beyond its results and frees again, given itself, its arguments and its result;
# several where one follows the other.
Temporaries = Callable[[Any, Sequence[Any], Any], Sequence[int]]


class AttentionCost(NamedTuple):
    """Bytes that one attention call keeps from forward to backward, and holds on top while either of them runs."""

    kept: int
    working: int


class StepPeak(NamedTuple):
    """Bytes at the moment of a step when most are held, by what they are for.

    `activations` are all tensors that are none of the others, the operators' temporaries included.
    """

    weights: int
    activations: int
    gradients: int
    optimizer: int
    attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True)
class Timeline:
    """One step as rows of ints, in the order in which things happened.

    Attributes:
        activations, gradients: bytes that a row allocates, negative where it frees them, `(E,)` int64.
        temporaries: bytes that come and go within a row, `(E,)` int64.
        calls: the attention call of a row, or -1, `(E,)` int64.
        keeps: 1 where what that call keeps is allocated, -1 where it is freed, `(E,)` int64.
        works: 1 where that call holds what it works with, `(E,)` int64.
        weights, optimizer: bytes that are held all the time.
    """

    activations: Tensor
    gradients: Tensor
    temporaries: Tensor
    calls: Tensor
    keeps: Tensor
    works: Tensor
    weights: int
    optimizer: int

    def peak(self, costs: Sequence[AttentionCost]) -> StepPeak:
        """The moment when most is held, where the attention calls take `costs`."""
        kept, working = torch.tensor([*costs, (0, 0)]).unbind(1)  # row -1 answers for rows without a call
        attention = (self.keeps * kept[self.calls]).cumsum(0) + self.works * working[self.calls]  # (E,)
        activations = self.activations.cumsum(0) + self.temporaries
        gradients = self.gradients.cumsum(0)
        most = int((activations + gradients + attention).argmax())
        return StepPeak(
            self.weights, int(activations[most]), int(gradients[most]), self.optimizer, int(attention[most])
        )

    def held_at_attention(self, costs: Sequence[AttentionCost]) -> int:
        """Most bytes that are held beside an attention call's own while one runs; other calls keep what `costs` say."""
        kept = torch.tensor([*(cost.kept for cost in costs), 0])[self.calls]
        held = (self.activations + self.gradients + self.keeps * kept).cumsum(0) - self.works * kept
        return self.weights + self.optimizer + int(torch.where(self.works == 1, held, 0).max())

    def has_the_rows_of(self, other: Timeline) -> bool:
        """The two record the same operators, of whatever sizes."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in ("calls", "keeps", "works"))

    def between(self, other: Timeline, numerator: int, denominator: int) -> Timeline:
        """`self + (other - self) * numerator / denominator`, for steps that differ in sizes alone.

        Raises:
            ValueError: the steps do not consist of the same rows.
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


class _Row(NamedTuple):
    allocated: int = 0
    temporary: int = 0
    call: int = -1
    keeps: int = 0
    works: int = 0
    birth: int = -1  # the row that allocated what this one frees


class MemoryRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch left it without types
    """Records a timeline while it is entered.

    Args:
        temporaries: what operators allocate and free within themselves.
    """

    def __init__(self, temporaries: Temporaries) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._temporaries = temporaries
        self._rows: list[_Row] = []
        self._births: dict[int, int] = {}  # of the storages that live, by id
        self._references: dict[int, weakref.ref[Any]] = {}
        self._gradients: set[int] = set()  # rows that allocated a gradient

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Counts no storage of `tensors`, which exist already."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage(), birth=-1)

    def count_as_gradients(self, tensors: Iterable[Tensor]) -> None:
        """The storages of `tensors`, allocated while recording, are gradients."""
        self._gradients |= {self._births[id(tensor.untyped_storage())] for tensor in tensors}

    def keep_for_backward(self, marker: Tensor, call: int) -> None:
        """`marker`, which was just made, stands for what attention `call` keeps for its backward pass."""
        birth = self._births[id(marker.untyped_storage())]
        self._rows[birth] = _Row(call=call, keeps=1)

    def work(self, call: int) -> None:
        """Attention `call` holds what it works with, now."""
        self._rows.append(_Row(call=call, works=1))

    def hold_for_a_while(self, size: int) -> None:
        """`size` bytes come and go, now."""
        self._rows.append(_Row(temporary=size))

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
        """What was recorded."""
        allocated, temporaries, calls, keeps, works, births = torch.tensor(self._rows).unbind(1)
        own = torch.arange(len(births))
        gradient = torch.isin(torch.where(births < 0, own, births), torch.tensor(sorted(self._gradients)))
        return Timeline(
            torch.where(gradient, 0, allocated),
            torch.where(gradient, allocated, 0),
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
