// The backward pass. It takes a block of keys, and for it one block of queries after another:
//   S^T = K Q^T,  P^T = 2^(c (S^T - m) - L),  dP^T = V G^T,  dS^T = P^T (dP^T - D),
//   dV += P^T G,  dK += dS^T Q,  dQ^T += K^T dS^T.
// G is the gradient of the output, D = sum(G O), and the forward pass kept the shift m of each row and the base-2
// logarithm L of its sum. Everything is transposed, because then only small operands of products have to be transposed.
// With dropout, P^T in dV, and dP^T, are multiplied by the factors of the forward pass: 0, or 1 / (1 - p).
//
// The gradient of a mask is the sum of dS over everything that the mask is broadcast along. If it is wanted, dS is
// computed once more for it, because then one thread can sum all that belongs to one number, in a fixed order. A mask
// with a number for each score has dS itself as its gradient. Where that is in float32, it is written at once.

#pragma once

#include <cmath>

#include "dropout.h"
#include "mask.h"
#include "packing.h"
#include "threads.h"

namespace {

// What belongs to one head of queries.
template <class Element>
struct QueryHead {
    Matrix<Element> query, grad_output;
    Mask mask;
    Index keys;  // before the padding
    Dropout dropout;
    RowSums kept;
    const float *delta;
    Mask grad_mask;  // where its gradient is written while it is computed; otherwise without data
};

template <class Mode>
struct Backward {
    const Call &call;
    const Sizes &sizes;
    Index threads, strip, parts, queries, keys, head_lanes, value_lanes, head_columns, value_columns;
    struct Space {
        Lane *key, *key_transposed, *value;                      // of a block of keys
        float *grad_key, *grad_value;
        Lane *query_columns, *query_lanes, *grad_columns, *grad_lanes;  // of a block of queries
        float *shifts, *logs, *delta;
        Lane *low, *high;                                               // of each query, for dropout
        float *scores, *grad_weights;                                   // of both blocks, some keys at a time
        Lane *weights, *grad_scores, *grad_score_lanes;
        float *grad_mask;                                               // of both blocks
    };

    // Threads take different heads. If there are too few heads, several threads share one, each for a part of its keys.
    explicit Backward(const Call &of) : call(of), sizes(of.sizes), threads(of.threads) {
        const Index heads = key_heads();
        parts = heads % threads == 0 || heads >= 4 * threads ? 1 : ceil_div(2 * threads, heads);
        strip = strip_of<Mode>(sizes);
        queries = std::min(Mode::block_queries, round_up(sizes.queries, Mode::step));
        keys = std::min(Mode::block_keys, round_up(sizes.keys, Mode::step));
        parts = std::min(parts, key_blocks());
        head_lanes = lanes_of<Mode>(sizes.head_dim);
        value_lanes = lanes_of<Mode>(sizes.value_dim);
        head_columns = round_up(sizes.head_dim, kWidth);
        value_columns = round_up(sizes.value_dim, kWidth);
    }
    Index key_heads() const { return sizes.batch * sizes.key_heads; }
    Index key_blocks() const { return ceil_div(sizes.keys, keys); }
    Index query_blocks() const { return ceil_div(sizes.queries, queries); }
    Index units() const { return key_heads() * parts; }
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
        space.low = arena.take<Lane>(call.drops() ? queries : 0);
        space.high = arena.take<Lane>(call.drops() ? queries : 0);
        space.scores = arena.take<float>(strip * queries);
        space.grad_weights = arena.take<float>(strip * queries);
        space.weights = arena.take<Lane>(strip * queries / per_lane);
        space.grad_scores = arena.take<Lane>(strip * queries / per_lane);
        space.grad_score_lanes = arena.take<Lane>(keys / per_lane * queries);
        space.grad_mask = arena.take<float>(call.mask_gradient ? keys * queries : 0);
        return space;
    }
    // Floats of the gradients of all queries of a head: transposed, one block of queries after another.
    Index grad_query_floats() const { return query_blocks() * queries * head_columns; }
    // Bytes of those of all heads that a unit computes.
    Index grad_query_bytes() const { return round_up(sizes.group() * grad_query_floats() * 4, 64); }
    Index thread_bytes() const {
        Arena arena{nullptr};
        carve(arena);
        return arena.used;
    }
    Index grad_query_buffers() const { return parts > 1 ? units() : std::min(threads, units()); }
    // All threads have their memory, as there may be more units of the mask's gradient.
    Index spaces() const { return call.mask_gradient ? threads : std::min(threads, units()); }
    Index bytes() const { return spaces() * thread_bytes() + grad_query_buffers() * grad_query_bytes(); }

    // A strip of keys and a block of queries.
    struct Strip {
        Index start, keys;      // in the block of keys
        Index key, key_end;     // the numbers of its first key, and of the first key after the block
        Index query, queries;   // the numbers of the first query and the number of queries
        Index width, key_lanes; // queries with padding, and lanes along the keys of the block
    };

    // P^T and dS^T of a strip.
    template <bool Drops>
    void weigh(const Space &space, const Strip &of, const Dropout &dropout) const {
        const Index lanes = of.width / Mode::per_lane;
        const Vector factor = all(call.exponent());
        if constexpr (Mode::per_lane == 1) {
            for (Index row = 0; row < of.keys; row++)
                for (Index j = 0; j < of.width; j += kWidth) {
                    Vector p = zeros(), ds = p;
                    if (of.key + row < of.key_end) weigh<Drops>(space, of, dropout, factor, row, j, p, ds);
                    store(reinterpret_cast<float *>(space.weights) + row * lanes + j, p);
                    store(reinterpret_cast<float *>(space.grad_scores) + row * lanes + j, ds);
                    Lane *to = panel(space.grad_score_lanes, of.key_lanes, of.width, of.start + row, j);
                    store(reinterpret_cast<float *>(to), ds);
                }
        } else {
            for (Index row = 0; row < of.keys; row += 2)
                for (Index j = 0; j < of.width; j += 2 * kWidth) {
                    Vector p[2][2] = {}, ds[2][2] = {};
                    for (int i = 0; i < 2; i++)
                        if (of.key + row + i < of.key_end) {
                            weigh<Drops>(space, of, dropout, factor, row + i, j, p[i][0], ds[i][0]);
                            weigh<Drops>(space, of, dropout, factor, row + i, j + kWidth, p[i][1], ds[i][1]);
                        }
                    for (int i = 0; i < 2; i++) {
                        const Index at = (row + i) * lanes + j / 2;
                        store(space.weights + at, Mode::both(p[i][0], p[i][1]));
                        store(space.grad_scores + at, Mode::both(ds[i][0], ds[i][1]));
                    }
                    Lane *to = panel(space.grad_score_lanes, of.key_lanes, of.width, (of.start + row) / 2, j);
                    for (int i = 0; i < 2; i++)
                        store(to + kWidth * i, Mode::interleaved(ds[0][i], ds[1][i]));
                }
        }
    }
    // kWidth queries of one key. `p` are the weights that are left by dropout, without its factor.
    template <bool Drops>
    void weigh(const Space &space, const Strip &of, const Dropout &dropout, Vector factor, Index row, Index j,
               Vector &p, Vector &ds) const {
        const Index at = row * of.width + j;
        const Vector s = load(space.scores + at), delta = load(space.delta + j);
        Vector dp = load(space.grad_weights + at);
        const Vector all_p = Mode::exp2(fmsub(s - load(space.shifts + j), factor, load(space.logs + j)));
        p = all_p;
        if constexpr (Drops) {
            const Words low = (Words)load(space.low + j), high = (Words)load(space.high + j);
            const Words key = all_words(static_cast<Lane>(of.key + row));
            p = dropout(p, low, high, key);
            dp = dropout(dp, low, high, key) * all(dropout.kept);
        }
        ds = all_p * (dp - delta);
    }

    template <class Element>
    void pack_keys(const Space &space, const Matrix<Element> &key, const Matrix<Element> &value, Index from,
                   Index count, Index padded) const {
        pack_rows<Mode>(space.key, head_lanes, key, from, count, padded);
        pack_rows<Mode>(space.value, value_lanes, value, from, count, padded);
    }

    template <class Element>
    void pack_queries(const Space &space, const QueryHead<Element> &head, Index start, Index rows, Index width) const {
        pack_columns<Mode>(space.query_columns, head_lanes, head.query, start, rows, width);
        pack_columns<Mode>(space.grad_columns, value_lanes, head.grad_output, start, rows, width);
        for (Index j = 0; j < width; j += kWidth) {
            // Padding rows get the logarithm infinity, so that their weights are 0.
            store(space.shifts + j, load_first(head.kept.shifts + start + j, rows - j));
            store(space.logs + j, load_first(head.kept.logs + start + j, rows - j, all(INFINITY)));
            store(space.delta + j, load_first(head.delta + start + j, rows - j));
        }
        for (Index j = 0; call.drops() && j < width; j++) {
            const std::uint64_t numbers = head.dropout.row(start + j);
            space.low[j] = static_cast<Lane>(numbers), space.high[j] = static_cast<Lane>(numbers >> 32);
        }
    }

    // S^T and dP^T of a strip.
    void score(const Space &space, const Strip &of, const Mask &mask) const {
        Mode::multiply({space.scores, of.width, space.key + of.start * head_lanes, head_lanes, space.query_columns,
                        of.keys, of.width, head_lanes, false});
        Mode::multiply({space.grad_weights, of.width, space.value + of.start * value_lanes, value_lanes,
                        space.grad_columns, of.keys, of.width, value_lanes, false});
        const Part part{space.scores, of.width, of.query, of.queries, of.key, of.keys};
        if (mask.data) add_mask_to_columns(part, mask, call.scale);
        if (call.causal) hide_earlier_queries(part);
        // Padding rows get scores of 0, because 0 times an infinite key would be NaN.
        for (Index i = 0; of.queries < of.width && i < of.keys; i++)
            for (float *all : {space.scores, space.grad_weights})
                std::fill(all + i * of.width + of.queries, all + (i + 1) * of.width, 0.0f);
    }

    // How many keys of the block from number `from` on some queries of a head see, in whole steps.
    template <class Element>
    Index seen(const QueryHead<Element> &head, Index padded, Index from, Index start, Index rows) const {
        const Index end = call.causal ? std::min(start + rows, head.keys) : head.keys;
        return std::min(padded, round_up(std::max<Index>(end - from, 0), Mode::step));
    }
    // Whether queries may leave out keys. Their sums then start as zeros; otherwise the first product stores its result.
    bool leaves_out() const { return call.causal || skips_hidden() || (call.masked() && call.mask.row == 0); }
    // Whether keys that the mask hides from a block of queries are left out. The gradient of a mask is written for all.
    bool skips_hidden() const { return call.masked() && !call.mask_gradient; }

    // The gradients of the keys of one unit, and what these keys add to the gradients of all queries. `head_of(i)` is
    // number i of the heads of queries that share the keys.
    template <class Element, class HeadOf>
    void differentiate(const Space &space, float *grad_query, const Matrix<Element> &key,
                       const Matrix<Element> &value, const HeadOf &head_of, const Matrix<Element> &grad_key,
                       const Matrix<Element> &grad_value, Index part) const {
        constexpr Index per_lane = Mode::per_lane;
        const Index begin = key_blocks() * part / parts, end = key_blocks() * (part + 1) / parts;
        if (leaves_out()) std::fill(grad_query, grad_query + sizes.group() * grad_query_floats(), 0.0f);
        for (Index key_block = begin; key_block < end; key_block++) {
            const Index from = key_block * keys, count = std::min(keys, sizes.keys - from);
            const Index padded = round_up(count, Mode::step), key_lanes = padded / per_lane;
            pack_keys(space, key, value, from, count, padded);
            pack_transposed<Mode>(space.key_transposed, head_columns, key, from, count, padded);
            bool add = leaves_out();
            if (add) {
                std::fill(space.grad_key, space.grad_key + padded * head_columns, 0.0f);
                std::fill(space.grad_value, space.grad_value + padded * value_columns, 0.0f);
            }
            for (Index number = 0; number < sizes.group(); number++) {
                const QueryHead<Element> head = head_of(number);
                float *grad_of_head = grad_query + number * grad_query_floats();
                for (Index start = 0; start < sizes.queries; start += queries) {
                    const Index rows = std::min(queries, sizes.queries - start), width = round_up(rows, Mode::step);
                    const Index some_keys = seen(head, padded, from, start, rows), lanes = width / per_lane;
                    if (!some_keys) continue;
                    pack_queries(space, head, start, rows, width);
                    pack_lanes<Mode>(space.query_lanes, head_columns, head.query, start, rows, width);
                    pack_lanes<Mode>(space.grad_lanes, value_columns, head.grad_output, start, rows, width);
                    for (Index row = 0; row < some_keys; row += strip) {
                        const Index some = std::min(strip, some_keys - row);
                        const Strip of{row, some, from + row, from + count, start, rows, width, key_lanes};
                        if (skips_hidden() &&
                            hides_all(head.mask, start, rows, of.key, std::min(some, count - row))) {
                            for (Index j = 0; j < width; j += kPanel)
                                std::fill_n(panel(space.grad_score_lanes, key_lanes, width, row / per_lane, j),
                                            some / per_lane * std::min(kPanel, width - j), Lane{0});
                            continue;
                        }
                        score(space, of, head.mask);
                        call.drops() ? weigh<true>(space, of, head.dropout) : weigh<false>(space, of, head.dropout);
                        Mode::multiply({space.grad_value + row * value_columns, value_columns, space.weights, lanes,
                                        space.grad_lanes, some, value_columns, lanes, add, 0, lanes, sizes.value_dim});
                        Mode::multiply({space.grad_key + row * head_columns, head_columns, space.grad_scores, lanes,
                                        space.query_lanes, some, head_columns, lanes, add, 0, lanes, sizes.head_dim});
                    }
                    Mode::multiply({grad_of_head + start * head_columns, width, space.key_transposed, key_lanes,
                                    space.grad_score_lanes, round_up(sizes.head_dim, Mode::m_step), width,
                                    some_keys / per_lane,
                                    leaves_out() || key_block > begin, 0, key_lanes});
                    if (head.grad_mask.data)
                        write_transposed(head.grad_mask, start, rows, from, count, [&](Index i, Index j) {
                            return reinterpret_cast<float *>(
                                panel(space.grad_score_lanes, key_lanes, width, i, j));
                        });
                    add = true;
                }
            }
            const Vector key_factor = all(call.scale), value_factor = all(head_of(0).dropout.kept);
            for (Index row = 0; row < count; row++) {
                for (Index j = 0; grad_key.data && j < sizes.head_dim; j += kWidth)
                    grad_key.set(from + row, j, load(space.grad_key + row * head_columns + j) * key_factor);
                for (Index j = 0; grad_value.data && j < sizes.value_dim; j += kWidth)
                    grad_value.set(from + row, j, load(space.grad_value + row * value_columns + j) * value_factor);
            }
        }
    }

    // ---- the gradient of the mask

    // Whether the gradients of all heads are written by `differentiate`, as each score has its own number of the mask.
    bool writes_mask_gradient() const {
        const Strides &own = call.grad_mask;
        return Mode::per_lane == 1 && !leaves_out() && own.row && own.column && (own.batch || sizes.batch == 1) &&
               (own.head || sizes.heads == 1);
    }

    // Writes numbers of `rows` queries from number `query` on, and `count` keys from number `key` on. `at(i, j)` is
    // where those of key i and kWidth queries from j on are, counted from the first ones.
    template <class At>
    static void write_transposed(const Mask &mask, Index query, Index rows, Index key, Index count, const At &at) {
        mask.visit_numbers([&](const auto &to) {
            for (Index i = 0; i < count; i += kWidth)
                for (Index j = 0; j < rows; j += kWidth) {
                    Lanes some[kWidth];
                    for (Index k = 0; k < kWidth; k++)
                        some[k] = i + k < count ? as_lanes(load(at(i + k, j))) : no_lanes();
                    transpose(some);
                    for (Index k = 0; k < std::min(kWidth, rows - j); k++)
                        to.set(query + j + k, key + i, as_floats(some[k]));
                }
        });
    }

    // A unit sums the numbers of one block of keys and one block of queries, or of all queries if these share the mask.
    // Batch items and heads that share a number of the mask belong to one unit too. A mask that all keys share has the
    // gradient zero, because it changes no weight; then there are no units.
    struct MaskUnits {
        Index items, heads, query_blocks, key_blocks;
        Index count() const { return items * heads * query_blocks * key_blocks; }
    };
    MaskUnits mask_units() const {
        const Strides &of = call.grad_mask;
        return {of.batch ? sizes.batch : 1, of.head ? sizes.heads : 1, of.row ? query_blocks() : 1,
                of.column ? key_blocks() : 0};
    }

    // Writes the gradient of one unit to `data`. `head_of(b, h)`, `key_of(b, h)` and `value_of(b, h)` are the operands of
    // query head h of batch item b.
    template <class HeadOf, class KeyOf, class ValueOf>
    void sum_mask_gradient(const Space &space, Index unit, const HeadOf &head_of, const KeyOf &key_of,
                           const ValueOf &value_of, void *data) const {
        const MaskUnits units = mask_units();
        const Index key_block = unit % units.key_blocks, query_block = unit / units.key_blocks % units.query_blocks;
        const Index head = unit / (units.key_blocks * units.query_blocks) % units.heads;
        const Index item = unit / (units.key_blocks * units.query_blocks * units.heads);
        const Strides &own = call.grad_mask;
        const Index from = key_block * keys, count = std::min(keys, sizes.keys - from);
        const Index start = query_block * queries, rows = own.row ? std::min(queries, sizes.queries - start) : 1;
        std::fill(space.grad_mask, space.grad_mask + keys * queries, 0.0f);
        for (Index b = own.batch ? item : 0; b < (own.batch ? item + 1 : sizes.batch); b++)
            for (Index h = own.head ? head : 0; h < (own.head ? head + 1 : sizes.heads); h++) {
                pack_keys(space, key_of(b, h), value_of(b, h), from, count, round_up(count, Mode::step));
                for (Index q = start; q < (own.row ? start + rows : sizes.queries); q += queries)
                    add_grad_scores(space, head_of(b, h), from, count, q);
            }
        if (!own.row)
            for (Index i = 0; i < keys; i++) {
                Vector sum = zeros();
                for (Index j = 0; j < queries; j += kWidth) sum = sum + load(space.grad_mask + i * queries + j);
                space.grad_mask[i * queries] = sum_of(sum);
            }
        write_transposed(mask_of(call, data, own, sizes.keys, item, head), start, rows, from, count,
                         [&](Index i, Index j) { return space.grad_mask + i * queries + j; });
    }

    // Adds dS^T of a block of keys, which is packed, and a block of queries of one head.
    template <class Element>
    void add_grad_scores(const Space &space, const QueryHead<Element> &head, Index from, Index count,
                         Index start) const {
        const Index rows = std::min(queries, sizes.queries - start), width = round_up(rows, Mode::step);
        const Index some_keys = seen(head, round_up(count, Mode::step), from, start, rows);
        if (!some_keys) return;
        pack_queries(space, head, start, rows, width);
        const Vector factor = all(call.exponent());
        for (Index row = 0; row < some_keys; row += strip) {
            const Index some = std::min(strip, some_keys - row);
            const Strip of{row, some, from + row, from + count, start, rows, width, 0};
            score(space, of, head.mask);
            for (Index i = 0; i < std::min(some, count - row); i++)
                for (Index j = 0; j < width; j += kWidth) {
                    Vector p, ds;
                    call.drops() ? weigh<true>(space, of, head.dropout, factor, i, j, p, ds)
                                 : weigh<false>(space, of, head.dropout, factor, i, j, p, ds);
                    float *sum = space.grad_mask + (row + i) * queries + j;
                    store(sum, load(sum) + ds);
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
