// Packs rows of a tensor as operands of products.h.

#pragma once

#include "products.h"

namespace {

// The number of lanes for this many columns, if the product sums over the columns.
template <class Mode>
Index lanes_of(Index columns) {
    return round_up(ceil_div(columns, Mode::per_lane), Mode::k_step);
}

// A row is fetched this many rows before it is packed. In a layer's layout the rows of a head are so far apart that the
// processor does not fetch the next one by itself.
constexpr Index kAhead = 24;

// Rows as A: (rows, lanes), with `padded` rows.
template <class Mode, class Element>
void pack_rows(Lane *to, Index lanes, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    for (Index row = 0; row < padded; row++) {
        if (row + kAhead < rows) prefetch(from, start + row + kAhead);
        for (Index lane = 0; lane < lanes; lane += kWidth) {
            const Lanes some = row < rows ? Mode::along(from, start + row, lane) : no_lanes();
            store_first(to + row * lanes + lane, lanes - lane, some);
        }
    }
}

// Rows as the columns of B: (lanes, padded rows), the rows' transpose.
template <class Mode, class Element>
void pack_columns(Lane *to, Index lanes, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    for (Index row = 0; row < padded; row += kWidth) {
        for (Index next = row + kAhead; next < std::min(row + kAhead + kWidth, rows); next++)
            prefetch(from, start + next);
        for (Index lane = 0; lane < lanes; lane += kWidth) {
            Lanes some[kWidth];
            for (int i = 0; i < kWidth; i++)
                some[i] = row + i < rows ? Mode::along(from, start + row + i, lane) : no_lanes();
            transpose(some);
            for (int i = 0; i < std::min<Index>(kWidth, lanes - lane); i++)
                store(panel(to, lanes, padded, lane + i, row), some[i]);
        }
    }
}

// Rows as B: lanes along `padded` rows, by `columns` columns.
template <class Mode, class Element>
void pack_lanes(Lane *to, Index columns, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    const Index lanes = padded / Mode::per_lane;
    const Matrix<Element> part = from.from_row(start);
    for (Index column = 0; column < columns; column += kWidth)
        for (Index lane = 0; lane < lanes; lane++)
            store(panel(to, lanes, columns, lane, column), Mode::across(part, lane, rows, column));
}

// Rows as the lanes of A: (columns, lanes along padded rows).
template <class Mode, class Element>
void pack_transposed(Lane *to, Index columns, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    const Index lanes = padded / Mode::per_lane;
    const Matrix<Element> part = from.from_row(start);
    for (Index column = 0; column < columns; column += kWidth)
        for (Index lane = 0; lane < lanes; lane += kWidth) {
            Lanes some[kWidth];
            for (int i = 0; i < kWidth; i++) some[i] = Mode::across(part, lane + i, rows, column);
            transpose(some);
            for (int i = 0; i < kWidth; i++)
                store_first(to + (column + i) * lanes + lane, lanes - lane, some[i]);
        }
}

// How many rows of scores are computed together. More for wide heads, because their packed keys and values do not stay
// in the cache.
template <class Mode>
constexpr Index most_strip = 2 * Mode::strip;
template <class Mode>
Index strip_of(const Sizes &sizes) {
    return std::max(sizes.head_dim, sizes.value_dim) > 160 ? most_strip<Mode> : Mode::strip;
}

}  // namespace
