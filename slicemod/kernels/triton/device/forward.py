"""The forward pass: a program has a block of rows and some columns of the output, and goes over all keys."""

import triton
import triton.language as tl

from slicemod.kernels.triton.device.dropout import dropout_factors
from slicemod.kernels.triton.device.matrices import as_type, head_of, product, rows_by_rows, store, tile
from slicemod.kernels.triton.device.scores import INFINITY, scores


@triton.jit
def forward_kernel(query, key, value, mask, output, sums, seed, factors, sizes, S: tl.constexpr):
    """Writes the output, and the log-sum-exp of each row unless `sums` is None.

    The log-sum-exp is in units of the scores, so that `exp2((score - logsumexp) * exponent)` is a weight. Of a row
    that sees no key it is +inf, which makes all its weights zero.
    """
    ROWS: tl.constexpr = S.rows
    KEYS: tl.constexpr = S.keys
    WIDTH: tl.constexpr = S.width
    CHUNKS: tl.constexpr = S.chunks
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
    masks = queries
    if S.mask != "none":
        masks = head_of(mask, item, head, sizes.queries, sizes.keys, 1)
    q = tile(queries, rows, tl.arange(0, WIDTH), UNIT)
    top = tl.full((ROWS,), -INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, OUT), tl.float32)
    stop = sizes.keys
    if S.causal:
        stop = tl.minimum(sizes.keys, first + ROWS)
    for start in range(0, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        s = rows_by_rows(q, queries, rows, keys_of_head, keys, WIDTH, CHUNKS, S)
        s = scores(s, masks, rows[:, None], keys[None, :], sizes, factors.scale, S)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == -INFINITY, 0.0, higher)  # -inf: no key so far, and all weights are zero
        weights = tl.exp2((s - base[:, None]) * factors.exponent)
        shrink = tl.exp2((top - base) * factors.exponent)
        total = total * shrink + tl.sum(weights, 1)
        if S.dropout:
            weights *= dropout_factors(seed, number, rows[:, None], keys[None, :], factors)
        v = tile(values, keys, out, UNIT)
        found = product(as_type(weights, v.dtype, S), v, found * shrink[:, None], S)
        top = higher
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    found = found / total[:, None]
    store(head_of(output, item, head, sizes.queries, DV, UNIT), rows, out, found, UNIT, S)
    if sums is not None:  # noqa: SIM102 - this is known when it is compiled, and the condition below is not
        if tl.program_id(1) == 0:
            logsumexp = tl.where(dead, INFINITY, top + tl.log2(total) / factors.exponent)
            tl.store(sums + number.to(tl.int64) * sizes.queries + rows, logsumexp, mask=rows < sizes.queries)
