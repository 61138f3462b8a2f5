// The mask of attention, and the order of causal attention: what is added to scores before their weights are computed.

#pragma once

#include <cmath>

#include "call.h"
#include "matrix.h"

namespace {

// A mask of bool: false hides a key from a query, as minus infinity does in a mask of numbers.
struct Bool {
    using Type = std::uint8_t;
    static Vector load(const Type *from, Index count) { return load_bool(from, count); }
};

// The mask of one head, or its gradient: rows are queries, columns are keys. Without a mask, `data` is null.
struct Mask {
    void *data;
    Index element, row_stride, column_stride, columns;

    // Calls run(Matrix) with the type of the mask's elements.
    template <class Run>
    void visit(const Run &run) const {
        element == kBool ? run(matrix<Bool>()) : visit_numbers(run);
    }
    template <class Run>
    void visit_numbers(const Run &run) const {
        element == kFloat32 ? run(matrix<Float32>()) : element == kFloat16 ? run(matrix<Float16>()) : run(matrix<Bfloat16>());
    }
    template <class Element>
    Matrix<Element> matrix() const {
        return {static_cast<typename Element::Type *>(data), row_stride, column_stride, columns};
    }
};

inline Mask mask_of(const Call &call, void *data, const Strides &strides, Index columns, Index batch, Index head) {
    if (!data) return {nullptr, 0, 0, 0, 0};
    const Index bytes = call.mask_element == kFloat32 ? 4 : call.mask_element == kBool ? 1 : 2;
    char *start = static_cast<char *>(data) + bytes * (batch * strides.batch + head * strides.head);
    return {start, call.mask_element, strides.row, strides.column, columns};
}

// The number of keys before the padding: keys at the end that the mask hides from every query. It is known without a
// look at the whole mask if all queries share it, as masks of padded texts do. It is at least 1.
inline Index keys_before_padding(const Mask &mask, Index keys) {
    if (!mask.data || mask.row_stride != 0) return keys;
    Index end = keys;
    mask.visit([&](const auto &numbers) {
        for (bool hidden = true; end > 1 && hidden;) {
            alignas(64) float some[kWidth];
            const Index start = std::max<Index>(end - kWidth, 0);
            store(some, numbers.floats(0, start));
            while (end > 1 && end > start && (hidden = some[end - 1 - start] == -INFINITY)) end--;
        }
    });
    return end;
}

// Whether the mask hides all of these keys from all of these queries. Where it does not, the first row mostly tells.
inline bool hides_all(const Mask &mask, Index query, Index queries, Index key, Index keys) {
    if (!mask.data) return false;
    bool hidden = true;
    mask.visit([&](const auto &numbers) {
        for (Index i = 0; i < queries && hidden; i++) {
            Vector most = all(-INFINITY), sum = most;  // the sum is NaN if a number is, the maximum is not
            Index j = 0;
            for (; j + kWidth <= keys; j += kWidth) {
                const Vector some = numbers.floats(query + i, key + j);
                most = larger(some, most);
                sum = sum + some;
            }
            alignas(64) float rest[kWidth];
            if (j < keys) store(rest, numbers.floats(query + i, key + j));
            for (Index k = 0; k < keys - j; k++) hidden &= rest[k] == -INFINITY;
            hidden &= largest_of(most) == -INFINITY && sum_of(sum) == -INFINITY;
        }
    });
    return hidden;
}

// A part of the scores: of some queries from number `query` on, and some keys from number `key` on.
struct Part {
    float *scores;
    Index stride, query, queries, key, keys;
};

// Scores become scale * score + mask. Rows are queries.
inline void add_mask(const Part &of, const Mask &mask, float scale) {
    mask.visit([&](const auto &numbers) {
        for (Index i = 0; i < of.queries; i++)
            for (Index j = 0; j < of.keys; j += kWidth) {
                float *at = of.scores + i * of.stride + j;
                store(at, fmadd(load(at), all(scale), numbers.floats(of.query + i, of.key + j)));
            }
    });
}

// The same where rows are keys.
inline void add_mask_to_columns(const Part &of, const Mask &mask, float scale) {
    mask.visit([&](const auto &numbers) {
        for (Index j = 0; j < of.queries; j += kWidth)
            for (Index i = 0; i < of.keys; i += kWidth) {
                Lanes some[kWidth];
                for (Index k = 0; k < kWidth; k++)
                    some[k] = j + k < of.queries ? as_lanes(numbers.floats(of.query + j + k, of.key + i)) : no_lanes();
                transpose(some);
                for (Index k = 0; k < std::min(kWidth, of.keys - i); k++) {
                    float *at = of.scores + (i + k) * of.stride + j;
                    store(at, fmadd(load(at), all(scale), as_floats(some[k])));
                }
            }
    });
}

// Hides from each query the keys after its own number. Rows are queries.
inline void hide_later_keys(const Part &of) {
    for (Index i = 0; i < of.queries; i++) {
        const Index seen = std::max<Index>(of.query + i + 1 - of.key, 0);
        if (seen < of.keys) std::fill(of.scores + i * of.stride + seen, of.scores + i * of.stride + of.keys, -INFINITY);
    }
}

// The same where rows are keys.
inline void hide_earlier_queries(const Part &of) {
    for (Index i = 0; i < of.keys; i++) {
        const Index hidden = std::clamp<Index>(of.key + i - of.query, 0, of.queries);
        std::fill(of.scores + i * of.stride, of.scores + i * of.stride + hidden, -INFINITY);
    }
}

}  // namespace
