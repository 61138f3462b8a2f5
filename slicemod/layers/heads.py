"""The heads of attention: from `(B, N, H D)`, which projections give, to `(B, H, N, D)`, and back.

Each takes two calls of PyTorch. einops would be clearer, but after a layer's large products its recipes cost as much
time as attention to a few tokens.
"""

from torch import Tensor


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """`(B, N, H D)` as `(B, H, N, D)`."""
    batch, tokens, width = tensor.shape
    return tensor.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def merge_heads(tensor: Tensor) -> Tensor:
    """`(B, H, N, D)` as `(B, N, H D)`, without a copy if the memory is laid out as `(B, N, H, D)`."""
    return tensor.transpose(1, 2).flatten(2)
