"""The gradient of query: a program has a block of rows and some columns of it, and goes over all keys."""

import triton
import triton.language as tl

from slicemod.kernels.triton.device.dropout import dropout_factors
from slicemod.kernels.triton.device.matrices import as_type, head_of, product, rows_by_rows, store, tile
from slicemod.kernels.triton.device.scores import INFINITY, scores, weights_again


@triton.jit
def query_gradient_kernel(
    query, key, value, mask, grad_output, sums, products, seed, gradient, factors, sizes, S: tl.constexpr
):
    """Writes the gradient; `products` are those of `row_products_kernel`."""
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
    blocks = tl.cdiv(sizes.queries, ROWS)
    number = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * ROWS
    item, head = (number // sizes.heads).to(tl.int64), (number % sizes.heads).to(tl.int64)
    rows, out = first + tl.arange(0, ROWS), tl.program_id(1) * OUT + tl.arange(0, OUT)
    queries = head_of(query, item, head, sizes.queries, D, UNIT)
    keys_of_head = head_of(key, item, head // sizes.group, sizes.keys, D, UNIT)
    values = head_of(value, item, head // sizes.group, sizes.keys, DV, UNIT)
    gradients = head_of(grad_output, item, head, sizes.queries, DV, UNIT)
    masks = queries
    if S.mask != "none":
        masks = head_of(mask, item, head, sizes.queries, sizes.keys, 1)
    q = tile(queries, rows, tl.arange(0, WIDTH), UNIT)
    g = tile(gradients, rows, tl.arange(0, VALUE_WIDTH), UNIT)
    of_row = number.to(tl.int64) * sizes.queries + rows
    logsumexp = tl.load(sums + of_row, mask=rows < sizes.queries, other=INFINITY)
    row_product = tl.load(products + of_row, mask=rows < sizes.queries, other=0.0)
    found = tl.zeros((ROWS, OUT), tl.float32)
    stop = sizes.keys
    if S.causal:
        stop = tl.minimum(sizes.keys, first + ROWS)
    for start in range(0, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        s = rows_by_rows(q, queries, rows, keys_of_head, keys, WIDTH, CHUNKS, S)
        s = scores(s, masks, rows[:, None], keys[None, :], sizes, factors.scale, S)
        weights = weights_again(s, logsumexp[:, None], factors.exponent)
        of_weights = rows_by_rows(g, gradients, rows, values, keys, VALUE_WIDTH, VALUE_CHUNKS, S)
        if S.dropout:
            of_weights *= dropout_factors(seed, number, rows[:, None], keys[None, :], factors)
        of_scores = weights * (of_weights - row_product[:, None])
        k = tile(keys_of_head, keys, out, UNIT)
        found = product(as_type(of_scores, k.dtype, S), k, found, S)
    store(head_of(gradient, item, head, sizes.queries, D, UNIT), rows, out, found * factors.scale, UNIT, S)
