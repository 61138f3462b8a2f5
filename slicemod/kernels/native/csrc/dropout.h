// Random numbers of dropout. Whether a weight is dropped follows from the seed and from the place of the weight: its
// head, query and key. So the backward pass finds the same weights, and it does not matter which thread computes them.
//
// A row of a head has two numbers of 32 bits, by SplitMix64 (doi.org/10.1145/2714064.2660195). They are mixed with the
// number of the key by multiplications and shifts, as in hash functions for whole numbers. This takes a fraction of the
// time of a generator like Philox.

#pragma once

#include "call.h"
#include "vectors.h"

namespace {

inline std::uint64_t split_mix(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// The weights of one head that are dropped.
struct Dropout {
    std::uint64_t head;  // a number of the head's own
    Lane least;          // a weight is kept if its 31 random bits are at least this number
    float kept;          // the factor of weights that are kept

    // The two numbers of a row, as one.
    std::uint64_t row(Index query) const { return split_mix(head ^ split_mix(static_cast<std::uint64_t>(query))); }

    // The weights, with zeros where they are dropped. `low` and `high` are the two numbers of the weight's row.
    Vector operator()(Vector weights, Words low, Words high, Words key) const {
        Words x = key * 0x9e3779b9u + low;
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        x = (x ^ (x >> 16) ^ high) * 0x2c1b3c6du;
        x = (x ^ (x >> 12)) * 0x297a2d39u;
        x = (x ^ (x >> 15)) >> 1;
        const Words stay = (Words)((SignedWords)x >= (SignedWords)all_words(least));
        return as_floats((Lanes)((Words)as_lanes(weights) & stay));
    }
};

inline Dropout dropout_of(const Call &call, const std::int64_t *seed, Index head) {
    if (!call.drops()) return {0, 0, 1};
    const std::uint64_t number = split_mix(static_cast<std::uint64_t>(*seed)) + static_cast<std::uint64_t>(head);
    const double p = call.dropout_p;
    const auto least = static_cast<Lane>(std::min(p * 2147483648.0, 2147483647.0));
    return {split_mix(number), least, p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f};
}

}  // namespace
