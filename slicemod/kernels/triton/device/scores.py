"""From products of queries and keys to scores, and to the weights that the backward pass has again.

Scores are kept so that a large one is exact where it counts, next to the largest of its row. Without an additive mask
they are the products themselves, and their difference to the largest is multiplied by the scale: subtraction of
numbers that are close is exact. With one they are scaled first, so that the mask can be added.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def scores(products, mask, rows, keys, sizes, scale, S: tl.constexpr):
    """Scores of these products, -inf where a row must not look.

    Args:
        products: of rows and keys, a tile.
        mask: the mask's matrix of this head.
        rows: their numbers, as a column; as a row, if the tile has keys by rows.
        keys: their numbers, as a row; or as a column.
        sizes: of the call.
        scale: of the products.
        S: the settings.
    """
    found = products
    if S.mask == "additive":
        found *= scale
    if S.mask != "none":
        at = mask.start + rows.to(tl.int64) * mask.row + keys.to(tl.int64) * mask.column
        there = (rows < sizes.queries) & (keys < sizes.keys)
        if S.mask == "bool":
            found += tl.where(tl.load(at, mask=there, other=0) != 0, 0.0, -INFINITY)
        else:
            found += tl.load(at, mask=there, other=0.0).to(tl.float32)
    if S.causal:
        found += tl.where(rows >= keys, 0.0, -INFINITY)
    return tl.where(keys < sizes.keys, found, -INFINITY)


@triton.jit
def weights_again(scores, logsumexp, exponent):
    """The weights of the forward pass. At most 1, even where a product of large numbers is rounded another way now."""
    return tl.exp2(tl.minimum((scores - logsumexp) * exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
