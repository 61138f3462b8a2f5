"""The product of each row of the output with its gradient, which the gradients of all scores of the row need."""

import triton
import triton.language as tl

from slicemod.kernels.triton.device.matrices import head_of, tile


@triton.jit
def row_products_kernel(output, grad_output, products, sizes, S: tl.constexpr):
    """Writes `(B, H, N)` float32 numbers; a program has a block of rows."""
    ROWS: tl.constexpr = S.rows
    WIDTH: tl.constexpr = S.value_width
    CHUNKS: tl.constexpr = S.value_chunks
    DV: tl.constexpr = S.value_dim
    UNIT: tl.constexpr = S.unit
    blocks = tl.cdiv(sizes.queries, ROWS)
    number = tl.program_id(0) // blocks
    item, head = (number // sizes.heads).to(tl.int64), (number % sizes.heads).to(tl.int64)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    outputs = head_of(output, item, head, sizes.queries, DV, UNIT)
    gradients = head_of(grad_output, item, head, sizes.queries, DV, UNIT)
    found = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        columns = chunk * WIDTH + tl.arange(0, WIDTH)
        one, other = tile(outputs, rows, columns, UNIT), tile(gradients, rows, columns, UNIT)
        found += tl.sum(one.to(tl.float32) * other.to(tl.float32), 1)
    tl.store(products + number.to(tl.int64) * sizes.queries + rows, found, mask=rows < sizes.queries)
