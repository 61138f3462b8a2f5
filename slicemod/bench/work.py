"""What a work is: something that every peer computes with the same weights, and that float64 checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slicemod.bench.peers import FULL, Peer
from slicemod.call import AttentionShape

_CHECKED_ROWS = 64  # of queries, compared with float64; the scores of all rows of a large image would not fit


class Exact(NamedTuple):
    """Some `rows` of what float64 makes of the attention layer at `path` of a module, given `args`."""

    path: str
    args: tuple[Tensor, ...]
    rows: Tensor
    wanted: Tensor  # (..., rows, C)


class Work(ABC):
    """Something to compute. Modules and inputs are made on the ambient `torch.device`, in float32.

    Attributes:
        series: what stays the same while the size changes.
        size: edge of the image in pixels, or tokens of a bare call.
        unit: of `size`.
        training_only: it makes no sense in inference.
    """

    series: str
    size: int
    unit = "px"
    training_only = False

    @property
    def name(self) -> str:
        """Series and size."""
        return f"{self.series}, {self.size} {self.unit}"

    @abstractmethod
    def build(self) -> nn.Module:
        """The module whose weights all peers share."""

    @abstractmethod
    def inputs(self) -> tuple[Any, ...]:
        """Positional arguments of the module, the first a tensor."""

    def has_gradient(self, position: int) -> bool:
        """Whether a training step wants the gradient of this input, if it is floating point."""
        return True

    @abstractmethod
    def computed_by(self, peer: Peer, base: nn.Module) -> nn.Module | None:
        """A module with the weights of `base` and the attention of `peer`; None where the peer has no such form."""

    @abstractmethod
    def exact(self, base: nn.Module, inputs: tuple[Any, ...]) -> list[Exact]:
        """What float64 makes of one attention layer of each kind."""

    @abstractmethod
    def attention(self) -> list[tuple[AttentionShape, int]]:
        """The attention calls, in float32, and how many there are of each."""

    def scores_bytes(self, itemsize: int, *, training: bool) -> int:
        """Bytes of the scores that unsliced attention holds at once: all layers' in training, else the largest's."""
        sizes = [(shape.scores_bytes // shape.itemsize * itemsize, count) for shape, count in self.attention()]
        return sum(size * count for size, count in sizes) if training else max(size for size, _ in sizes)

    def flops(self, *, training: bool) -> int:
        """Floating-point operations of products and convolutions; a training step has three times the forward's."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            module = self.computed_by(FULL, self.build())
            if module is not None:
                module(*self.inputs())
        return int(counter.get_total_flops()) * (3 if training else 1)


def some_rows(count: int) -> Tensor:
    """Some rows of `count`, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, _CHECKED_ROWS)).long()
