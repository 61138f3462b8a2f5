// The forward pass. It takes a block of queries, and for it one block of keys after another, with a running softmax
// over these (arXiv 2112.05682, 2205.14135): S = Q K^T, P = 2^(c (S - m)), O = O 2^(c (m_old - m)) + P V, c = scale
// log2(e).
//
// The shift m of a row is first the maximum of its first scores. Weights in bfloat16 are as exact above 1 as below. So
// m is raised to the maximum so far, and the sums are scaled, only when the weights have become large.
//
// The exponent is c (S - m) and not c S - c m. A score that equals the shift then has the weight 1, however large it
// is. With c S - c m the exponent would be a rounding error, which is thousands for scores of 2^40. If weights are
// rounded to bfloat16 and the shift is near zero, c S - c m is as good, and it takes one instruction less.
//
// With a mask, scores are scaled before it is added to them, and c is log2(e). Dropout changes the weights that values
// are multiplied by, and not their sum.

#pragma once

#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

#include "dropout.h"
#include "mask.h"
#include "packing.h"
#include "threads.h"

namespace {

// Blocks of queries are large, because keys and values are packed again for each block. But every thread should get
// several blocks.
constexpr Index kMostQueries = 1024, kLeastQueries = 128, kBlocksOfThread = 4;

// The shift of a row without scores so far.
constexpr float kNoShift = -std::numeric_limits<float>::max();

// One head of the inputs and of the output.
template <class Element>
struct Head {
    Matrix<Element> query, key, value, output;
    Mask mask;
    Dropout dropout;
    RowSums kept;
};

template <class Mode>
struct Forward {
    const Call &call;
    const Sizes &sizes;
    Index strip, queries, keys, chunk, head_lanes, value_columns;
    struct Space {
        Lane *query, *key, *value, *weights;
        float *scores, *output, *shifts, *sums, *new_sums;
    };

    explicit Forward(const Call &of) : call(of), sizes(of.sizes) {
        strip = strip_of<Mode>(sizes);
        Index most = kMostQueries;
        while (most > kLeastQueries &&
               sizes.batch * sizes.heads * ceil_div(sizes.queries, most) < kBlocksOfThread * call.threads)
            most /= 2;
        queries = std::min(round_up(most, std::lcm<Index>(strip, kWidth)), round_up(sizes.queries, kWidth));
        keys = std::min(Mode::forward_keys, round_up(sizes.keys, Mode::step));
        chunk = std::min(Mode::chunk, keys);
        head_lanes = lanes_of<Mode>(sizes.head_dim);
        value_columns = round_up(sizes.value_dim, kWidth);
    }
    Index blocks() const { return ceil_div(sizes.queries, queries); }
    Index units() const { return sizes.batch * sizes.heads * blocks(); }
    Space carve(Arena &arena) const {
        return {arena.take<Lane>(queries * head_lanes), arena.take<Lane>(keys * head_lanes),
                arena.take<Lane>(keys / Mode::per_lane * value_columns),
                arena.take<Lane>(strip * keys / Mode::per_lane), arena.take<float>(strip * chunk),
                arena.take<float>(queries * value_columns), arena.take<float>(queries),
                arena.take<float>(queries * kWidth), arena.take<float>(strip * kWidth)};
    }
    Index bytes() const {
        Arena arena{nullptr};
        carve(arena);
        return arena.used;
    }

    // Raises the shifts of some queries to the maxima of a chunk of scores, and scales the sums so far by the
    // difference. Returns whether a shift is far from zero.
    bool raise_shifts(const Space &space, Index width, Index start, Index rows, float c, float *sums,
                      bool has_output) const {
        alignas(64) float maxima[round_up(most_strip<Mode>, kWidth)] = {};
        for (Index row = 0; row < rows; row++) {
            const float *scores = space.scores + row * width;
            Vector most = load(scores), other = most;
            Index j = kWidth;
            for (; j + 2 * kWidth <= width; j += 2 * kWidth) {
                most = larger(load(scores + j), most);
                other = larger(load(scores + j + kWidth), other);
            }
            for (; j < width; j += kWidth) most = larger(load(scores + j), most);
            maxima[row] = largest_of(larger(most, other));
        }
        for (Index row = 0; row < rows; row += kWidth) {
            const Vector old = load_first(space.shifts + start + row, rows - row);
            const Vector now = larger(load(maxima + row), old);
            store_first(space.shifts + start + row, rows - row, now);
            store(maxima + row, exp2_fine((old - now) * all(c)));
        }
        bool far = false;
        for (Index row = 0; row < rows; row++) {
            far |= !(std::abs(space.shifts[start + row]) * c <= Mode::near);
            if (maxima[row] == 1) continue;
            const Vector by = all(maxima[row]);
            store(sums + row * kWidth, load(sums + row * kWidth) * by);
            float *output = space.output + (start + row) * value_columns;
            for (Index j = 0; has_output && j < value_columns; j += kWidth)
                store(output + j, load(output + j) * by);
        }
        return far;
    }

    // A chunk of the scores of a strip of queries, and where its weights go.
    struct Chunk {
        Index start, rows;  // of the strip in the block of queries
        Index query, key;   // the numbers of the first ones, of the whole call
        Index lane, lanes;  // of the weights: the chunk's first one, and those of a row
    };

    // Computes the weights of a chunk of scores. `new_sums` becomes `sums` plus these weights; returns its largest
    // number.
    template <bool Far, bool Drops, class Width>
    float weigh(const Space &space, Width width, const Chunk &of, const Dropout &dropout, const float *sums,
                float *new_sums) const {
        const float c = call.exponent();
        const Vector factor = all(c);
        Vector most = zeros();
        for (Index row = 0; row < of.rows; row++) {
            Words low, high;
            if constexpr (Drops) {
                const std::uint64_t numbers = dropout.row(of.query + row);
                low = all_words(static_cast<Lane>(numbers)), high = all_words(static_cast<Lane>(numbers >> 32));
            }
            const auto left = [&](Vector p, Index j) {
                if constexpr (Drops) p = dropout(p, low, high, counted_from(static_cast<Lane>(of.key + j)));
                return p;
            };
            const float *scores = space.scores + row * width;
            const Vector shift = all(Far ? space.shifts[of.start + row] : space.shifts[of.start + row] * c);
            const auto exponent = [&](const float *score) {
                return Far ? (load(score) - shift) * factor : fmsub(load(score), factor, shift);
            };
            Vector sum = load(sums + row * kWidth);
            Lane *weights = space.weights + row * of.lanes + of.lane;
            if constexpr (Mode::per_lane == 1) {
                for (Index j = 0; j < width; j += kWidth) {
                    const Vector p = Mode::exp2(exponent(scores + j));
                    sum = sum + p;
                    store(reinterpret_cast<float *>(weights) + j, left(p, j));
                }
            } else {
                for (Index j = 0; j < width; j += 2 * kWidth) {
                    const Vector p = Mode::exp2(exponent(scores + j));
                    const Vector q = Mode::exp2(exponent(scores + j + kWidth));
                    const Lanes both = Mode::both(p, q);
                    sum = Mode::add_both(sum, both);
                    store(weights + j / 2, Drops ? Mode::both(left(p, j), left(q, j + kWidth)) : both);
                }
            }
            store(new_sums + row * kWidth, sum);
            most = larger(sum, most);  // keeps `most` if the sum is NaN
        }
        return largest_of(most);
    }

    // How many keys of a block the queries before number `end` see, in whole panels of packed keys.
    Index seen_by(Index end, Index from, Index padded) const {
        if (!call.causal) return padded;
        return std::min(padded, round_up(std::max<Index>(end - from, 0), std::lcm(Mode::step, kPanel)));
    }

    // The part of the scores of `width` keys from number `key` on that a strip of queries sees.
    void score(const Space &space, Index width, const Chunk &of, Index packed_key, const Mask &mask) const {
        Mode::multiply({space.scores, width, space.query + of.start * head_lanes, head_lanes,
                        space.key + packed_key * head_lanes, of.rows, width, head_lanes, false});
        const Index rows = std::min(of.rows, sizes.queries - of.query);  // the others are padding
        const Part part{space.scores, width, of.query, rows, of.key, width};
        if (mask.data) add_mask(part, mask, call.scale);
        if (call.causal) hide_later_keys(part);
        for (Index i = 0; sizes.keys < of.key + width && i < of.rows; i++)
            std::fill(space.scores + i * width + (sizes.keys - of.key), space.scores + (i + 1) * width, -INFINITY);
    }

    template <class Element>
    void attend(const Space &space, const Head<Element> &head, Index start) const {
        const float c = call.exponent();
        const Index rows = std::min(queries, sizes.queries - start);
        const Index padded_rows = round_up(rows, kWidth);
        pack_rows<Mode>(space.query, head_lanes, head.query, start, rows, padded_rows);
        std::fill(space.shifts, space.shifts + padded_rows, kNoShift);
        std::fill(space.sums, space.sums + padded_rows * kWidth, 0.0f);
        bool far = false;
        const Index keys_of_strip = ceil_div(keys, ceil_div(padded_rows, strip));
        Index all_keys = keys_before_padding(head.mask, sizes.keys);
        if (call.causal) all_keys = std::min(all_keys, start + rows);
        for (Index from = 0; from < all_keys; from += keys) {
            const Index count = std::min(keys, all_keys - from);
            const Index padded = round_up(count, Mode::step), lanes = padded / Mode::per_lane;
            Index ahead = from + keys;
            pack_columns<Mode>(space.key, head_lanes, head.key, from, count, padded);
            pack_lanes<Mode>(space.value, value_columns, head.value, from, count, padded);
            for (Index row = 0; row < padded_rows; row += strip) {
                const Index some = std::min(strip, padded_rows - row);
                for (const Index end = std::min(ahead + keys_of_strip, all_keys); ahead < end; ahead++) {
                    prefetch(head.key, ahead);
                    prefetch(head.value, ahead);
                }
                const Index seen = seen_by(start + row + some, from, padded);
                float *sums = space.sums + row * kWidth, *new_sums = space.new_sums;
                Index multiplied = 0;  // keys of the block
                const auto multiply = [&](Index end) {
                    const Index lane = multiplied / Mode::per_lane;
                    Mode::multiply({space.output + row * value_columns, value_columns, space.weights + lane, lanes,
                                    space.value, some, value_columns, end / Mode::per_lane - lane,
                                    from + multiplied > 0, lane, lanes, sizes.value_dim});
                    multiplied = end;
                };
                for (Index j = 0; j < seen; j += chunk) {
                    const Index width = std::min(chunk, seen - j);
                    if (hides_all(head.mask, start + row, std::min(some, rows - row), from + j,
                                  std::min(width, count - j))) {
                        if (multiplied < j) multiply(j);
                        if (from + j == 0) std::fill_n(space.output + row * value_columns, some * value_columns, 0.0f);
                        multiplied = j + width;
                        continue;
                    }
                    const Chunk of{row, some, start + row, from + j, j / Mode::per_lane, lanes};
                    score(space, width, of, j, head.mask);
                    const auto raise = [&] {
                        if (multiplied < j) multiply(j);
                        far |= raise_shifts(space, width, row, some, c, sums, from + multiplied > 0);
                    };
                    const auto weigh_chunk = [&](auto columns) {
                        if (Mode::near == 0 || far)
                            return weigh<true, false>(space, columns, of, head.dropout, sums, new_sums);
                        return weigh<false, false>(space, columns, of, head.dropout, sums, new_sums);
                    };
                    // The compiler unrolls the loop if it knows its length.
                    const auto weigh_all = [&] {
                        if (call.drops()) return weigh<true, true>(space, width, of, head.dropout, sums, new_sums);
                        return width == Mode::chunk ? weigh_chunk(std::integral_constant<Index, Mode::chunk>{})
                                                    : weigh_chunk(width);
                    };
                    const bool has_shift = space.shifts[row] > kNoShift;
                    if (!has_shift || !Mode::most_sum) raise();
                    if (weigh_all() > Mode::most_sum && Mode::most_sum) {
                        raise();
                        weigh_all();
                    }
                    std::swap(sums, new_sums);
                }
                if (multiplied < seen) multiply(seen);
                if (sums == space.new_sums) std::copy(sums, sums + some * kWidth, space.sums + row * kWidth);
            }
        }
        for (Index row = 0; row < rows; row++) {
            float sum = sum_of(load(space.sums + row * kWidth));
            const bool dead = sum == 0;  // the query has no key with a weight
            const Vector by = all(dead ? 0 : head.dropout.kept / sum);
            for (Index j = 0; j < sizes.value_dim; j += kWidth)
                head.output.set(start + row, j, load(space.output + row * value_columns + j) * by);
            if (head.kept.shifts) {
                head.kept.shifts[start + row] = space.shifts[row];
                head.kept.logs[start + row] = dead ? 0 : std::log2(sum);
            }
        }
    }
};

}  // namespace
