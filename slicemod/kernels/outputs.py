"""Makes the tensors that kernels write their results into."""

from torch import Tensor


def empty_heads(like: Tensor, width: int) -> Tensor:
    """An uninitialised `(B, H, N, width)`, laid out as `(B, N, H, width)`: a layer merges its heads without a copy."""
    batch, heads, tokens, _ = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients for the tensors that need one, and tensors without elements for the others."""
    grads = [
        empty_heads(tensor, tensor.shape[3]) if needed else tensor.new_empty(0)
        for tensor, needed in zip((query, key, value), needs, strict=False)
    ]
    grad_mask = mask.new_empty(mask.shape) if needs[3] and mask is not None else query.new_empty(0)
    return grads[0], grads[1], grads[2], grad_mask
