"""Which weights are dropped: this follows from a seed and the place of the weight, so no pass has to remember it."""

import triton
import triton.language as tl


@triton.jit
def dropout_factors(seed, head, rows, keys, factors):
    """The factor of each weight: 0, or what makes up for those that are dropped.

    Args:
        seed: where a whole number is.
        head: number of the head in all of the batch.
        rows: their numbers, as a column; or as a row.
        keys: their numbers, as a row; or as a column.
        factors: the `Factors`.
    """
    key, row = (rows * 0 + keys).to(tl.uint32), (rows + keys * 0).to(tl.uint32)
    drawn, _, _, _ = tl.philox(tl.load(seed), key, row, key * 0 + head.to(tl.uint32), key * 0)
    return tl.where(tl.uint_to_uniform_float(drawn) >= factors.dropout_p, factors.kept, 0.0)
