"""What a VAE's encoder and decoder are made of. Each host describes its own so, and `running.py` computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

Activation: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Convolution:
    """A convolution of 3x3 pixels with a border of one, after a norm and an activation if there are any."""

    conv: Any
    norm: nn.GroupNorm | None = None
    activation: Activation | None = None


@dataclass(frozen=True)
class Resnet:
    """`(shortcut(x) + second(first(x))) / scale`. Without a shortcut it is `x` itself."""

    first: Convolution
    second: Convolution
    shortcut: Any = None
    scale: float = 1.0


@dataclass(frozen=True)
class Upsample:
    """Every pixel four times, and then a convolution of 3x3 pixels."""

    conv: Any


@dataclass(frozen=True)
class Downsample:
    """A convolution of 3x3 pixels in steps of two, with a border of one below and on the right."""

    conv: Any


@dataclass(frozen=True)
class Whole:
    """A module that needs the whole image: the attention."""

    module: nn.Module
    channels: int


Layer: TypeAlias = Convolution | Resnet | Upsample | Downsample | Whole


def silu(normed: Tensor) -> Tensor:
    """In place: nobody else has what a norm returned."""
    return F.silu(normed, inplace=True)
