"""What is known of a GPU, in plain values: enough to tell which of PyTorch's CUDA kernels runs there, and its bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

_KIB = 1024

# Shared memory that one block may ask for ("opt in"), by compute capability: table "Technical Specifications per
# Compute Capability" of NVIDIA's CUDA programming guide.
_SHARED_MEMORY = {
    (7, 0): 96 * _KIB,
    (7, 2): 96 * _KIB,
    (7, 5): 64 * _KIB,
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 7): 163 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB,
    (10, 3): 227 * _KIB,
    (11, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
    (12, 1): 99 * _KIB,
}
_LEAST_SHARED_MEMORY = 48 * _KIB  # every CUDA device has this


class Card(NamedTuple):
    """One GPU.

    Attributes:
        name: what people call it.
        capability: CUDA's compute capability, such as `(8, 6)`; None for a GPU that is not NVIDIA's.
        processors: streaming multiprocessors.
    """

    name: str
    capability: tuple[int, int] | None
    processors: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may ask for. The least that any card has if it is not known."""
        return _SHARED_MEMORY.get(self.capability or (0, 0), _LEAST_SHARED_MEMORY)


ASSUMED_CARD = Card("H100", (9, 0), 132)  # for plans of a GPU that is not in this machine


def card_of(device: torch.device) -> Card:
    """The card of a CUDA device; `ASSUMED_CARD` if this machine has none, and for devices of other types."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED_CARD
    return _card(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return Card(properties.name, capability, properties.multi_processor_count)
