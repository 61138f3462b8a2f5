"""What a kernel of ours can read: it gets an address, and takes the numbers there as they are."""

from __future__ import annotations

import torch
from torch import Tensor


def address_of(tensor: Tensor) -> int | None:
    """The address of a tensor's numbers; None if the memory there does not hold them as they are.

    This is so for a view with the negative bit, for a tensor of zeros that has no memory, and for an address between
    two elements.
    """
    address = tensor.data_ptr()
    return None if not address or address % tensor.element_size() or tensor.is_neg() else address


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory does not hold its numbers as they are."""
    if address_of(tensor) is not None:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
