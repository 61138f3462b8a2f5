"""The gradient of an additive mask: a program has a tile of it, and goes over all that the mask is broadcast along.

A mask that is broadcast along the keys is not computed here: it adds the same to all scores of a row, which changes no
weight, so its gradient is zero.
"""

import triton
import triton.language as tl

from slicemod.kernels.triton.device.dropout import dropout_factors
from slicemod.kernels.triton.device.matrices import as_type, head_of, rows_by_rows, store, tile
from slicemod.kernels.triton.device.scores import INFINITY, scores, weights_again


@triton.jit
def mask_gradient_kernel(
    query,
    key,
    value,
    mask,
    grad_output,
    sums,
    products,
    seed,
    gradient,
    shared,
    factors,
    sizes,
    ALL_ROWS: tl.constexpr,
    S: tl.constexpr,
):
    """Writes the gradient, summed over the items and heads of `shared`, and over all rows if `ALL_ROWS` says so."""
    ROWS: tl.constexpr = S.rows
    KEYS: tl.constexpr = S.keys
    WIDTH: tl.constexpr = S.width
    CHUNKS: tl.constexpr = S.chunks
    VALUE_WIDTH: tl.constexpr = S.value_width
    VALUE_CHUNKS: tl.constexpr = S.value_chunks
    D: tl.constexpr = S.head_dim
    DV: tl.constexpr = S.value_dim
    UNIT: tl.constexpr = S.unit
    row_blocks, key_blocks = tl.cdiv(sizes.queries, ROWS), tl.cdiv(sizes.keys, KEYS)
    own_rows = 1 if ALL_ROWS else row_blocks
    turns_of_rows = row_blocks if ALL_ROWS else 1
    keys = tl.program_id(0) % key_blocks * KEYS + tl.arange(0, KEYS)
    first_row = tl.program_id(0) // key_blocks % own_rows
    owner = tl.program_id(0) // key_blocks // own_rows
    found = tl.zeros((ROWS, KEYS), tl.float32)
    for turn in range(shared.items * shared.heads * turns_of_rows):
        rows = (first_row + turn % turns_of_rows) * ROWS + tl.arange(0, ROWS)
        member = turn // turns_of_rows
        item = (owner // shared.own_heads + member // shared.heads).to(tl.int64)
        head = (owner % shared.own_heads + member % shared.heads).to(tl.int64)
        queries = head_of(query, item, head, sizes.queries, D, UNIT)
        keys_of_head = head_of(key, item, head // sizes.group, sizes.keys, D, UNIT)
        values = head_of(value, item, head // sizes.group, sizes.keys, DV, UNIT)
        gradients = head_of(grad_output, item, head, sizes.queries, DV, UNIT)
        masks = head_of(mask, item, head, sizes.queries, sizes.keys, 1)
        q = tile(queries, rows, tl.arange(0, WIDTH), UNIT)
        g = tile(gradients, rows, tl.arange(0, VALUE_WIDTH), UNIT)
        of_all = item * sizes.heads + head
        of_row = of_all * sizes.queries + rows
        logsumexp = tl.load(sums + of_row, mask=rows < sizes.queries, other=INFINITY)
        row_product = tl.load(products + of_row, mask=rows < sizes.queries, other=0.0)
        s = rows_by_rows(q, queries, rows, keys_of_head, keys, WIDTH, CHUNKS, S)
        s = scores(s, masks, rows[:, None], keys[None, :], sizes, factors.scale, S)
        of_weights = rows_by_rows(g, gradients, rows, values, keys, VALUE_WIDTH, VALUE_CHUNKS, S)
        if S.dropout:
            of_weights *= dropout_factors(seed, of_all, rows[:, None], keys[None, :], factors)
        found += weights_again(s, logsumexp[:, None], factors.exponent) * (of_weights - row_product[:, None])
    own_item, own_head = (owner // shared.own_heads).to(tl.int64), (owner % shared.own_heads).to(tl.int64)
    own = head_of(gradient, own_item, own_head, sizes.queries, sizes.keys, 1)
    TYPE: tl.constexpr = gradient.data.dtype.element_ty
    if ALL_ROWS:
        numbers = as_type(tl.sum(found, 0), TYPE, S).to(TYPE)
        tl.store(own.start + keys.to(tl.int64) * own.column, numbers, mask=keys < sizes.keys)
    else:
        store(own, first_row * ROWS + tl.arange(0, ROWS), keys, found, 1, S)
