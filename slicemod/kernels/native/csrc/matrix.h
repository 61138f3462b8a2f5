// The tensors: the types of their elements, and one head as a matrix with any strides.

#pragma once

#include "call.h"
#include "vectors.h"

namespace {

struct Float32 {
    using Type = float;
    static Vector load(const Type *from, Index count) { return load_first(from, count); }
    static void store(Type *to, Index count, Vector values) { store_first(to, count, values); }
};

struct Float16 {
    using Type = std::uint16_t;
    static Vector load(const Type *from, Index count) { return load_float16(from, count); }
    static void store(Type *to, Index count, Vector values) { store_float16(to, count, values); }
};

struct Bfloat16 {
    using Type = std::uint16_t;
    static Vector load(const Type *from, Index count) { return load_bfloat16(from, count); }
    static void store(Type *to, Index count, Vector values) { store_bfloat16(to, count, values); }
};

// What the forward pass keeps of each row for the backward pass: its shift, and the base-2 logarithm of its sum of
// weights.
struct RowSums {
    float *shifts, *logs;
};

// One head of a tensor: rows (tokens) by columns (channels).
template <class Element>
struct Matrix {
    using Type = typename Element::Type;
    Type *data;
    Index row_stride, column_stride, columns;

    Matrix from_row(Index start) const { return {data + start * row_stride, row_stride, column_stride, columns}; }

    // kWidth columns of a row in float32, with zeros beyond the last column.
    Vector floats(Index row, Index column) const {
        const Type *from = data + row * row_stride + column * column_stride;
        if (column_stride == 1) return Element::load(from, columns - column);
        alignas(64) Type some[kWidth] = {};
        for (Index i = 0; i < std::min(kWidth, columns - column); i++) some[i] = from[i * column_stride];
        return Element::load(some, kWidth);
    }

    void set(Index row, Index column, Vector values) const {
        Type *to = data + row * row_stride + column * column_stride;
        if (column_stride == 1) return Element::store(to, columns - column, values);
        alignas(64) Type some[kWidth];
        Element::store(some, kWidth, values);
        for (Index i = 0; i < std::min(kWidth, columns - column); i++) to[i * column_stride] = some[i];
    }
};

template <class Element>
Matrix<Element> head_of(void *data, const Strides &strides, Index batch, Index head, Index columns) {
    using Type = typename Element::Type;
    Type *start = static_cast<Type *>(data) + batch * strides.batch + head * strides.head;
    return {start, strides.row, strides.column, columns};
}

// Fetches a row into the second-level cache while other rows are used.
template <class Element>
void prefetch(const Matrix<Element> &of, Index row) {
    const char *start = reinterpret_cast<const char *>(of.data + row * of.row_stride);
    for (Index j = 0; j < of.columns * static_cast<Index>(sizeof(*of.data)); j += 64)
        __builtin_prefetch(start + j, 0, 2);
}

}  // namespace
