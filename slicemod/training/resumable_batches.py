"""Batches whose order depends on a seed and the epoch alone, and whose position goes into checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

Planned = TypeVar("Planned")
Batch = TypeVar("Batch")


class ResumableBatches(ABC, Generic[Planned, Batch]):
    """Iterates over planned batches; a run that stopped in the middle of an epoch continues where it stopped.

    Lightning stores ``state_dict()`` in its checkpoints, so that a continued run sees the batches that an
    uninterrupted one sees.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._next_batch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches of an epoch, the same in each."""

    @abstractmethod
    def plan_epoch(self, epoch: int) -> Sequence[Planned]:
        """What each batch of an epoch holds; depends on nothing but the epoch's number."""

    @abstractmethod
    def load(self, planned: Planned, number: int) -> Batch:
        """The batch itself; ``number`` counts batches from the first epoch on."""

    def __iter__(self) -> Iterator[Batch]:
        if self._next_batch >= len(self):
            self._epoch, self._next_batch = self._epoch + 1, 0
        planned = self.plan_epoch(self._epoch)
        while self._next_batch < len(planned):
            place = self._next_batch
            self._next_batch += 1
            yield self.load(planned[place], self._epoch * len(self) + place)

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch and the number of its next batch."""
        return {"epoch": self._epoch, "next_batch": self._next_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a position that ``state_dict()`` gave."""
        self._epoch, self._next_batch = state["epoch"], state["next_batch"]
