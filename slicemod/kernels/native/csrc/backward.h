// The backward pass. It takes a block of keys, and for it one block of queries after another:
//   S^T = K Q^T,  P^T = 2^(c (S^T - m) - L),  dP^T = V G^T,  dS^T = P^T (dP^T - D),
//   dV += P^T G,  dK += dS^T Q,  dQ^T += K^T dS^T.
// G is the gradient of the output, D = sum(G O), and the forward pass kept the shift m of each row and the base-2
// logarithm L of its sum. Everything is transposed, because then only small operands of products have to be transposed.

#pragma once

#include <cmath>

#include "packing.h"
#include "threads.h"

namespace {

template <class Mode>
struct Backward {
    const Sizes sizes;
    Index threads, strip, parts, queries, keys, head_lanes, value_lanes, head_columns, value_columns;
    struct Space {
        Lane *key, *key_transposed, *value;                      // of a block of keys
        float *grad_key, *grad_value;
        Lane *query_columns, *query_lanes, *grad_columns, *grad_lanes;  // of a block of queries
        float *shifts, *logs, *delta;
        float *scores, *grad_weights;                                   // of both blocks, some keys at a time
        Lane *weights, *grad_scores, *grad_score_lanes;
    };

    // Threads take different heads. If there are too few heads, several threads share one, each for a part of its keys.
    Backward(const Sizes &of, Index on_threads) : sizes(of), threads(on_threads) {
        const Index heads = of.batch * of.heads;
        parts = heads % threads == 0 || heads >= 4 * threads ? 1 : ceil_div(2 * threads, heads);
        strip = strip_of<Mode>(of);
        queries = std::min(Mode::block_queries, round_up(of.queries, Mode::step));
        keys = std::min(Mode::block_keys, round_up(of.keys, Mode::step));
        parts = std::min(parts, ceil_div(of.keys, keys));
        head_lanes = lanes_of<Mode>(of.head_dim);
        value_lanes = lanes_of<Mode>(of.value_dim);
        head_columns = round_up(of.head_dim, kWidth);
        value_columns = round_up(of.value_dim, kWidth);
    }
    Index units() const { return sizes.batch * sizes.heads * parts; }
    Space carve(Arena &arena) const {
        constexpr Index per_lane = Mode::per_lane;
        Space space;
        space.key = arena.take<Lane>(keys * head_lanes);
        space.key_transposed = arena.take<Lane>(head_columns * keys / per_lane);
        space.value = arena.take<Lane>(keys * value_lanes);
        space.grad_key = arena.take<float>(keys * head_columns);
        space.grad_value = arena.take<float>(keys * value_columns);
        space.query_columns = arena.take<Lane>(head_lanes * queries);
        space.query_lanes = arena.take<Lane>(queries / per_lane * head_columns);
        space.grad_columns = arena.take<Lane>(value_lanes * queries);
        space.grad_lanes = arena.take<Lane>(queries / per_lane * value_columns);
        space.shifts = arena.take<float>(queries);
        space.logs = arena.take<float>(queries);
        space.delta = arena.take<float>(queries);
        space.scores = arena.take<float>(strip * queries);
        space.grad_weights = arena.take<float>(strip * queries);
        space.weights = arena.take<Lane>(strip * queries / per_lane);
        space.grad_scores = arena.take<Lane>(strip * queries / per_lane);
        space.grad_score_lanes = arena.take<Lane>(keys / per_lane * queries);
        return space;
    }
    // Floats of the gradients of all queries of a head: transposed, one block of queries after another.
    Index grad_query_floats() const { return ceil_div(sizes.queries, queries) * queries * head_columns; }
    Index thread_bytes() const {
        Arena arena{nullptr};
        carve(arena);
        return arena.used;
    }
    Index grad_query_buffers() const { return parts > 1 ? units() : std::min(threads, units()); }
    Index bytes() const {
        return std::min(threads, units()) * thread_bytes() + grad_query_buffers() * round_up(grad_query_floats() * 4, 64);
    }

    // P^T and dS^T for `some` keys, from number `start` of the block on, and a block of queries.
    void weigh(const Space &space, Index start, Index some, Index count, Index padded, Index width, float c) const {
        const Vector factor = all(c);
        const Index lanes = width / Mode::per_lane, key_lanes = padded / Mode::per_lane;
        if constexpr (Mode::per_lane == 1) {
            for (Index row = 0; row < some; row++)
                for (Index j = 0; j < width; j += kWidth) {
                    Vector p = zeros(), ds = p;
                    if (start + row < count) weigh(space, row * width + j, j, factor, p, ds);
                    store(reinterpret_cast<float *>(space.weights) + row * lanes + j, p);
                    store(reinterpret_cast<float *>(space.grad_scores) + row * lanes + j, ds);
                    Lane *to = panel(space.grad_score_lanes, key_lanes, width, start + row, j);
                    store(reinterpret_cast<float *>(to), ds);
                }
        } else {
            for (Index row = 0; row < some; row += 2)
                for (Index j = 0; j < width; j += 2 * kWidth) {
                    Vector p[2][2] = {}, ds[2][2] = {};
                    for (int i = 0; i < 2; i++)
                        if (start + row + i < count) {
                            weigh(space, (row + i) * width + j, j, factor, p[i][0], ds[i][0]);
                            weigh(space, (row + i) * width + j + kWidth, j + kWidth, factor, p[i][1], ds[i][1]);
                        }
                    for (int i = 0; i < 2; i++) {
                        const Index at = (row + i) * lanes + j / 2;
                        store(space.weights + at, Mode::both(p[i][0], p[i][1]));
                        store(space.grad_scores + at, Mode::both(ds[i][0], ds[i][1]));
                    }
                    Lane *to = panel(space.grad_score_lanes, key_lanes, width, (start + row) / 2, j);
                    for (int i = 0; i < 2; i++)
                        store(to + kWidth * i, Mode::interleaved(ds[0][i], ds[1][i]));
                }
        }
    }
    void weigh(const Space &space, Index at, Index j, Vector factor, Vector &p, Vector &ds) const {
        const Vector s = load(space.scores + at), dp = load(space.grad_weights + at);
        p = Mode::exp2(fmsub(s - load(space.shifts + j), factor, load(space.logs + j)));
        ds = p * (dp - load(space.delta + j));
    }

    // The gradients of the keys of one unit, and what these keys add to the gradients of all queries.
    template <class Element>
    void differentiate(const Space &space, float *grad_query, const Matrix<Element> &query, const Matrix<Element> &key,
                       const Matrix<Element> &value, const Matrix<Element> &grad, const RowSums &kept,
                       const float *delta, const Matrix<Element> &grad_key, const Matrix<Element> &grad_value,
                       Index part, float scale) const {
        constexpr Index per_lane = Mode::per_lane;
        const float c = scale * static_cast<float>(M_LOG2E);
        const Index blocks = ceil_div(sizes.keys, keys);
        const Index begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        for (Index key_block = begin; key_block < end; key_block++) {
            const Index from = key_block * keys, count = std::min(keys, sizes.keys - from);
            const Index padded = round_up(count, Mode::step);
            pack_rows<Mode>(space.key, head_lanes, key, from, count, padded);
            pack_rows<Mode>(space.value, value_lanes, value, from, count, padded);
            pack_transposed<Mode>(space.key_transposed, head_columns, key, from, count, padded);
            for (Index start = 0; start < sizes.queries; start += queries) {
                const Index rows = std::min(queries, sizes.queries - start), width = round_up(rows, Mode::step);
                pack_columns<Mode>(space.query_columns, head_lanes, query, start, rows, width);
                pack_lanes<Mode>(space.query_lanes, head_columns, query, start, rows, width);
                pack_columns<Mode>(space.grad_columns, value_lanes, grad, start, rows, width);
                pack_lanes<Mode>(space.grad_lanes, value_columns, grad, start, rows, width);
                for (Index j = 0; j < width; j += kWidth) {
                    // Padding rows get the logarithm infinity, so that their weights are 0.
                    store(space.shifts + j, load_first(kept.shifts + start + j, rows - j));
                    store(space.logs + j, load_first(kept.logs + start + j, rows - j, all(INFINITY)));
                    store(space.delta + j, load_first(delta + start + j, rows - j));
                }
                for (Index row = 0; row < padded; row += strip) {
                    const Index some = std::min(strip, padded - row);
                    Mode::multiply({space.scores, width, space.key + row * head_lanes, head_lanes, space.query_columns,
                                    some, width, head_lanes, false});
                    Mode::multiply({space.grad_weights, width, space.value + row * value_lanes, value_lanes,
                                    space.grad_columns, some, width, value_lanes, false});
                    // Padding rows get scores of 0, because 0 times an infinite key would be NaN.
                    for (Index i = 0; rows < width && i < some; i++)
                        for (float *all : {space.scores, space.grad_weights})
                            std::fill(all + i * width + rows, all + (i + 1) * width, 0.0f);
                    weigh(space, row, some, count, padded, width, c);
                    const Index lanes = width / per_lane;
                    Mode::multiply({space.grad_value + row * value_columns, value_columns, space.weights, lanes,
                                    space.grad_lanes, some, value_columns, lanes, start > 0});
                    Mode::multiply({space.grad_key + row * head_columns, head_columns, space.grad_scores, lanes,
                                    space.query_lanes, some, head_columns, lanes, start > 0});
                }
                Mode::multiply({grad_query + start * head_columns, width, space.key_transposed, padded / per_lane,
                                space.grad_score_lanes, head_columns, width, padded / per_lane, key_block > begin});
            }
            const Vector by = all(scale);
            for (Index row = 0; row < count; row++) {
                for (Index j = 0; grad_key.data && j < sizes.head_dim; j += kWidth)
                    grad_key.set(from + row, j,
                                 load(space.grad_key + row * head_columns + j) * by);
                for (Index j = 0; grad_value.data && j < sizes.value_dim; j += kWidth)
                    grad_value.set(from + row, j, load(space.grad_value + row * value_columns + j));
            }
        }
    }

    // Writes the gradients of a head's queries: the sum of `count` transposed parts.
    template <class Element>
    void settle(const Matrix<Element> &to, const float *parts_of, Index count, Index stride, float scale) const {
        for (Index start = 0; start < sizes.queries; start += queries) {
            const Index rows = std::min(queries, sizes.queries - start), width = round_up(rows, Mode::step);
            for (Index column = 0; column < head_columns; column += kWidth)
                for (Index row = 0; row < rows; row += kWidth) {
                    Lanes some[kWidth];
                    for (int i = 0; i < kWidth; i++) {
                        const float *from = parts_of + start * head_columns + (column + i) * width + row;
                        Vector sum = load(from);
                        for (Index part = 1; part < count; part++)
                            sum = sum + load(from + part * stride);
                        some[i] = as_lanes(sum * all(scale));
                    }
                    transpose(some);
                    for (Index i = 0; i < std::min<Index>(kWidth, rows - row); i++)
                        to.set(start + row + i, column, as_floats(some[i]));
                }
        }
    }
};

}  // namespace
