"""How a device multiplies matrices, as far as the sliced kernel has to know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slicemod.torch_internals import bmm_widened_into

# Apple's M1 and M2 sum wrongly, without an error, over 32767 or more terms (pytorch/pytorch#195163).
_MOST_TERMS_ON_METAL = 32_766
# Metal's results are wrong, without an error, where an index exceeds 2**32 (pytorch/pytorch#179352), and calls fail
# above it (#149261). ComfyUI holds to 2**31. This leaves room for an index in bytes.
_MOST_SCORES_ON_METAL = 2**30
# By estimates from the speeds of tensor cores and of memory, products of half precision are faster than those of
# float32 copies from here on. They were not measured.
_LEAST_WIDENED_DIM = 80


class Products(NamedTuple):
    """What a device can multiply.

    Attributes:
        widened: `(left, right, out)`: the batched product of half precision, written into float32; None without one.
        adds_into_views: a product can be added to a tensor that is not contiguous.
        most_terms: the most terms of a sum; None for any number.
        most_scores: the most scores at a time; None for any number.
    """

    widened: Callable[[Tensor, Tensor, Tensor], object] | None = None
    adds_into_views: bool = True
    most_terms: int | None = None
    most_scores: int | None = None


PLAIN = Products()

# Metal's graph writes a `baddbmm` into a tensor that is not contiguous wrongly before macOS 26. PyTorch guards `mm` and
# `bmm` against this, and not `baddbmm`.
_METAL = Products(adds_into_views=False, most_terms=_MOST_TERMS_ON_METAL, most_scores=_MOST_SCORES_ON_METAL)
_WIDENED = Products(bmm_widened_into)


def products_of(device_type: str, itemsize: int, head_dim: int) -> Products:
    """How a type of device multiplies queries of `itemsize` bytes an element and `head_dim` channels a head."""
    if device_type == "mps":
        return _METAL
    widens = device_type == "cuda" and itemsize == 2 and head_dim >= _LEAST_WIDENED_DIM and torch.version.hip is None
    return _WIDENED if widens else PLAIN
