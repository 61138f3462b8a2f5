"""Tiles of matrices: where they are, loads, stores and products."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Head(NamedTuple):
    """One head's matrix in memory: where it begins, its strides and its sizes. Made by `head_of` on the GPU."""

    start: Any
    row: Any
    column: Any
    height: Any
    width: Any


@triton.jit
def head_of(matrix, item, head, height, width, UNIT: tl.constexpr):
    """The matrix `(height, width)` of one head of a `Matrix`. `item` and `head` are int64."""
    # The unit is multiplied here, where the compiler sees it: it then knows that rows begin at multiples of 16 bytes.
    start = matrix.data + item * matrix.item * UNIT + head * matrix.head * UNIT
    return Head(start, matrix.row, matrix.column, height, width)


@triton.jit
def tile(head, rows, columns, UNIT: tl.constexpr):
    """Its elements `(rows, columns)`, and zeros beyond its sizes."""
    at = head.start + rows.to(tl.int64)[:, None] * head.row * UNIT + columns.to(tl.int64)[None, :] * head.column
    return tl.load(at, mask=(rows < head.height)[:, None] & (columns < head.width)[None, :], other=0.0)


@triton.jit
def store(head, rows, columns, numbers, UNIT: tl.constexpr, S: tl.constexpr):
    """Write float32 numbers, rounded, where the matrix has an element."""
    at = head.start + rows.to(tl.int64)[:, None] * head.row * UNIT + columns.to(tl.int64)[None, :] * head.column
    rounded = as_type(numbers, head.start.dtype.element_ty, S).to(head.start.dtype.element_ty)
    tl.store(at, rounded, mask=(rows < head.height)[:, None] & (columns < head.width)[None, :])


@triton.jit
def as_type(numbers, TYPE: tl.constexpr, S: tl.constexpr):
    """float32 numbers rounded to a type. Interpreted, they stay float32, because the interpreter cuts digits off."""
    if S.emulated:
        if TYPE == tl.bfloat16:  # noqa: SIM300 - in capitals, but no constant
            bits = numbers.to(tl.int32, bitcast=True)
            even = bits + 0x7FFF + ((bits >> 16) & 1)
            rounded = ((even >> 16) << 16).to(tl.float32, bitcast=True)
            return tl.where(tl.abs(numbers) < float("inf"), rounded, numbers)
        return numbers.to(TYPE).to(tl.float32)
    return numbers.to(TYPE)


@triton.jit
def product(one, other, added, S: tl.constexpr):
    """`one @ other + added`, summed in float32."""
    if S.emulated:  # the interpreter would multiply the bits of bfloat16 as whole numbers
        return tl.dot(one.to(tl.float32), other.to(tl.float32), added, input_precision="ieee")
    return tl.dot(one, other, added, input_precision="ieee")


@triton.jit
def rows_by_rows(first, one, rows, other, other_rows, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr):
    """`one[rows] @ other[other_rows].T`, in float32.

    `first` is the first chunk of `one[rows]`, of `WIDTH` columns. If it is the only one, it was loaded once; others
    are loaded here.
    """
    UNIT: tl.constexpr = S.unit
    columns = tl.arange(0, WIDTH)
    found = tl.zeros((rows.shape[0], other_rows.shape[0]), tl.float32)
    found = product(first, tl.trans(tile(other, other_rows, columns, UNIT)), found, S)
    for chunk in range(1, CHUNKS):
        more = chunk * WIDTH + columns
        found = product(tile(one, rows, more, UNIT), tl.trans(tile(other, other_rows, more, UNIT)), found, S)
    return found
