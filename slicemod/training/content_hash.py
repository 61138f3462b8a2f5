"""Digests that name cached results by what they were computed from."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def text_digest(*parts: object) -> str:
    """Of the parts' text.

    >>> text_digest("a", 1) == text_digest("a", "1"), text_digest("a", "b") == text_digest("ab")
    (True, False)
    """
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def module_digest(module: nn.Module, *parts: object) -> str:
    """Of a module's tensors, their names, shapes and types, and of the parts' text."""
    digest = hashlib.sha256(text_digest(*parts).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
