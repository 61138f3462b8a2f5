"""Batches whose images depend on a seed and the epoch alone, and whose position, in images, goes into checkpoints."""

from __future__ import annotations

import heapq
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch

from slicemod.user_error import UserError

Batch = TypeVar("Batch")


class PlannedBatch(NamedTuple):
    """The images of one batch.

    Attributes:
        images: their places in the data.
        numbers: a number of each that no other image of this epoch or of another one has; noise follows from it.
        group: which group they are from.
    """

    images: list[int]
    numbers: list[int]
    group: int


class ResumableBatches(ABC, Generic[Batch]):
    """Iterates over images in batches; a run that stopped in the middle of an epoch continues where it stopped.

    Lightning stores ``state_dict()`` in its checkpoints. The position is the number of images that were seen of each
    group, and the order within a group depends on the seed and the epoch alone. So a continued run sees the images that
    an uninterrupted one sees; with another batch size or another number of processes each image of the epoch still
    comes once, with the noise that it would have had.

    Args:
        groups: images, by their places, that may come in one batch; each image is in one group.
        batch_size: images of a batch, of all processes together.
        seed: of the order; None keeps the order, and the numbers of the images, in every epoch.
        multiple: a batch's images are a multiple of this; what is left over of a group waits for the next epoch.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int | None, multiple: int = 1) -> None:
        self.groups = [list(group) for group in groups]
        self.batch_size = batch_size
        self.seed = seed
        self.multiple = multiple
        self._epoch = 0
        self._seen = [0] * len(self.groups)
        self._settled: dict[str, Any] | None = None
        self._length = len(self.plan_epoch(0))

    @abstractmethod
    def load(self, planned: PlannedBatch) -> Batch:
        """The batch itself."""

    def __len__(self) -> int:
        """Batches of a whole epoch, the same in each."""
        return self._length

    @property
    def images(self) -> int:
        """Images of an epoch, those left over included."""
        return sum(map(len, self.groups))

    @property
    def left(self) -> int:
        """Batches that are left of the running epoch."""
        return len(self.plan_epoch(self._epoch, self._seen))

    def plan_epoch(self, epoch: int, seen: Sequence[int] | None = None) -> list[PlannedBatch]:
        """The batches of an epoch.

        All images of an epoch stand in one random line. Each batch takes the first one in it, and behind it the next
        ones of the same group: which batch is next depends on what was seen and on nothing before.

        Args:
            epoch: from 0 on.
            seen: how many images of each group are done; None is none.
        """
        places = self._line(epoch)
        first = 0 if self.seed is None else epoch * self.images
        queues = [sorted(group, key=places.__getitem__) for group in self.groups]
        at = list(seen or [0] * len(queues))
        heads = [(places[queue[at[group]]], group) for group, queue in enumerate(queues) if at[group] < len(queue)]
        heapq.heapify(heads)
        batches = []
        while heads:
            _, group = heapq.heappop(heads)
            start, queue = at[group], queues[group]
            count = min(self.batch_size, len(queue) - start)
            count -= count % self.multiple
            if not count:
                continue
            images = queue[start : start + count]
            batches.append(PlannedBatch(images, [first + places[image] for image in images], group))
            at[group] = start + count
            if at[group] < len(queue):
                heapq.heappush(heads, (places[queue[at[group]]], group))
        return batches

    def _line(self, epoch: int) -> dict[int, int]:
        """The place of each image in the epoch's line."""
        images = sorted(image for group in self.groups for image in group)
        if self.seed is None:
            return {image: place for place, image in enumerate(images)}
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return dict(zip(images, torch.randperm(len(images), generator=draw).tolist(), strict=True))

    def __iter__(self) -> Iterator[Batch]:
        if not self.left:
            self._epoch, self._seen = self._epoch + 1, [0] * len(self.groups)
        for planned in self.plan_epoch(self._epoch, self._seen):
            self._seen[planned.group] += len(planned.images)
            yield self.load(planned)

    def settle(self) -> None:
        """Says that what was handed out is trained on; from now on ``state_dict()`` counts no more than that."""
        self._settled = self._position()

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, and of each group how many images there are and how many were seen."""
        return self._settled or self._position()

    def _position(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "seen": list(self._seen), "groups": [len(group) for group in self.groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a position that ``state_dict()`` gave; where the images have changed, with the next epoch.

        Raises:
            UserError: an earlier version gave it.
        """
        if "seen" not in state:
            raise UserError(
                "The checkpoint's position counts batches and not images: an earlier version of slicemod wrote it."
                " Start a new run; a digits model can start from its weights, --model.init_from."
            )
        self._epoch, self._seen = state["epoch"], list(state["seen"])
        self._settled = None
        if self.has_other_images(state):
            self._epoch, self._seen = self._epoch + 1, [0] * len(self.groups)

    def has_other_images(self, state: Mapping[str, Any]) -> bool:
        """Whether the position is one among other images than these, by their number."""
        return bool(state["groups"] != [len(group) for group in self.groups])


class SettlesSteps(pl.Callback):
    """Has checkpoints hold the position after the last whole step, and Lightning count its batches from there.

    Batches whose gradients are still accumulating, or whose step failed, are in no checkpoint: they come again.
    """

    def __init__(self) -> None:
        self._step = 0
        self._position: dict[str, Any] | None = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts the batches and epochs that are done as they are now.

        Lightning ends an epoch after so many batches, which with another batch size are not as many as before, and
        takes an epoch that ``max_steps`` ended for a whole one.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        stored = checkpoint["loops"].get("fit_loop", {})
        positions = stored.get("state_dict", {}).get("combined_loader", [])
        if data is None or not positions:
            return
        batches = data.train_dataloader()
        if not isinstance(batches, ResumableBatches):
            return
        self._position = positions[0]
        batches.load_state_dict(positions[0])
        if batches.has_other_images(positions[0]) and trainer.is_global_zero:
            warnings.warn(
                f"The data has {batches.images} images where the checkpoint's had {sum(positions[0]['groups'])}, or"
                " other sizes of them: a new epoch begins, and what was left of the last one is not trained on.",
                stacklevel=2,
            )
        if trainer.limit_train_batches == 1.0:  # else epochs end where the option says
            _count_as_done(stored, len(batches) - batches.left, batches.left)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hands the position of a checkpoint to the batches."""
        if self._position is not None and isinstance(trainer.train_dataloader, ResumableBatches):
            trainer.train_dataloader.load_state_dict(self._position)  # Lightning does not where an epoch was done
            self._position = None
        self._settle(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After each optimizer step, what was drawn counts as trained on."""
        if trainer.global_step != self._step:
            self._settle(trainer)

    def _settle(self, trainer: pl.Trainer) -> None:
        self._step = trainer.global_step
        if isinstance(trainer.train_dataloader, ResumableBatches):
            trainer.train_dataloader.settle()


def _count_as_done(loop: dict[str, Any], done: int, left: int) -> None:
    """Corrects the state of Lightning's loop: ``done`` batches of the running epoch are done and ``left`` are left."""
    progress, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    current, total = progress["current"], progress["total"]
    if left and epochs["current"]["processed"] == epochs["current"]["ready"]:
        for counts in epochs.values():
            counts["processed"] = counts["completed"] = counts["ready"] - 1
    if current["ready"] == current["processed"] == done:
        return
    unended = int(current["processed"] > current["completed"])  # stored while a batch was being ended
    for counts in (current, total):
        counts["ready"] = counts["started"] = counts["processed"]
    for name in current:
        current[name] = done
    current["completed"] = done - unended
