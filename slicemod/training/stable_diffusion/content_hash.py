"""Digests that name cached results by what they were computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def text_digest(*parts: object) -> str:
    """Of the parts' text.

    >>> text_digest("a", 1) == text_digest("a", "1"), text_digest("a", "b") == text_digest("ab")
    (True, False)
    """
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def module_digest(module: nn.Module, *parts: object) -> str:
    """Of a module's tensors, their names, shapes and types, and of the parts' text."""
    return tensors_digest(module.state_dict(), *parts)


def tensors_digest(tensors: Mapping[str, Tensor], *parts: object) -> str:
    """Of tensors in their order, their names, shapes and types, and of the parts' text."""
    digest = hashlib.sha256(text_digest(*parts).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
