"""The gradients of key and value: a program has a block of keys and some columns of them, and goes over all rows.

It goes over the rows of all heads that share the key in turn, so that nothing is summed by several programs: the same
inputs always give the same sums.
"""

import triton
import triton.language as tl

from slicemod.kernels.triton.device.dropout import dropout_factors
from slicemod.kernels.triton.device.matrices import as_type, head_of, product, rows_by_rows, store, tile
from slicemod.kernels.triton.device.scores import INFINITY, scores, weights_again


@triton.jit
def key_value_gradients_kernel(
    query,
    key,
    value,
    mask,
    grad_output,
    sums,
    products,
    seed,
    key_gradient,
    value_gradient,
    factors,
    sizes,
    S: tl.constexpr,
):
    """Writes the gradients that are not None. Tiles have keys by rows, as both products take them."""
    ROWS: tl.constexpr = S.rows
    KEYS: tl.constexpr = S.keys
    WIDTH: tl.constexpr = S.width
    CHUNKS: tl.constexpr = S.chunks
    VALUE_WIDTH: tl.constexpr = S.value_width
    VALUE_CHUNKS: tl.constexpr = S.value_chunks
    OUT: tl.constexpr = S.out_width
    D: tl.constexpr = S.head_dim
    DV: tl.constexpr = S.value_dim
    UNIT: tl.constexpr = S.unit
    blocks = tl.cdiv(sizes.keys, KEYS)
    number = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * KEYS
    key_heads = sizes.heads // sizes.group
    item, key_head = (number // key_heads).to(tl.int64), (number % key_heads).to(tl.int64)
    keys, out = first + tl.arange(0, KEYS), tl.program_id(1) * OUT + tl.arange(0, OUT)
    keys_of_head = head_of(key, item, key_head, sizes.keys, D, UNIT)
    values = head_of(value, item, key_head, sizes.keys, DV, UNIT)
    k = tile(keys_of_head, keys, tl.arange(0, WIDTH), UNIT)
    v = tile(values, keys, tl.arange(0, VALUE_WIDTH), UNIT)
    of_key = tl.zeros((KEYS, OUT), tl.float32)
    of_value = tl.zeros((KEYS, OUT), tl.float32)
    first_row = 0
    if S.causal:
        first_row = first // ROWS * ROWS
    for member in range(sizes.group):
        head = key_head * sizes.group + member
        queries = head_of(query, item, head, sizes.queries, D, UNIT)
        gradients = head_of(grad_output, item, head, sizes.queries, DV, UNIT)
        masks = queries
        if S.mask != "none":
            masks = head_of(mask, item, head, sizes.queries, sizes.keys, 1)
        of_all = item * sizes.heads + head
        for start in range(first_row, sizes.queries, ROWS):
            rows = start + tl.arange(0, ROWS)
            of_row = of_all * sizes.queries + rows
            logsumexp = tl.load(sums + of_row, mask=rows < sizes.queries, other=INFINITY)
            s = rows_by_rows(k, keys_of_head, keys, queries, rows, WIDTH, CHUNKS, S)
            s = scores(s, masks, rows[None, :], keys[:, None], sizes, factors.scale, S)
            weights = weights_again(s, logsumexp[None, :], factors.exponent)
            kept = weights
            if S.dropout:
                drop = dropout_factors(seed, of_all, rows[None, :], keys[:, None], factors)
                kept = weights * drop
            if value_gradient is not None:
                g = tile(gradients, rows, out, UNIT)
                of_value = product(as_type(kept, g.dtype, S), g, of_value, S)
            if key_gradient is not None:
                row_product = tl.load(products + of_row, mask=rows < sizes.queries, other=0.0)
                of_weights = rows_by_rows(v, values, keys, gradients, rows, VALUE_WIDTH, VALUE_CHUNKS, S)
                if S.dropout:
                    of_weights *= drop
                of_scores = weights * (of_weights - row_product[None, :])
                q = tile(queries, rows, out, UNIT)
                of_key = product(as_type(of_scores, q.dtype, S), q, of_key, S)
    if key_gradient is not None:
        store(head_of(key_gradient, item, key_head, sizes.keys, D, UNIT), keys, out, of_key * factors.scale, UNIT, S)
    if value_gradient is not None:
        store(head_of(value_gradient, item, key_head, sizes.keys, DV, UNIT), keys, out, of_value, UNIT, S)
