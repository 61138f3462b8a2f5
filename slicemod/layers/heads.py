"""The heads of attention: `(B, N, H D)`, as projections have it, seen as `(B, H, N, D)`, and back.

In two calls of PyTorch each: where a layer's products have emptied the caches, einops' recipes cost as much as its
attention to a few tokens.
"""

from torch import Tensor


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """`(B, N, H D)` as `(B, H, N, D)`."""
    batch, tokens, width = tensor.shape
    return tensor.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def merge_heads(tensor: Tensor) -> Tensor:
    """`(B, H, N, D)` as `(B, N, H D)`; without a copy where it is laid out so."""
    return tensor.transpose(1, 2).flatten(2)
