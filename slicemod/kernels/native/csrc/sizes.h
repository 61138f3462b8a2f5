// Integer types, and the sizes and strides of the tensors.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

using Index = std::int64_t;
using Lane = std::uint32_t;

constexpr Index ceil_div(Index size, Index parts) { return (size + parts - 1) / parts; }
constexpr Index round_up(Index size, Index multiple) { return ceil_div(size, multiple) * multiple; }

}  // namespace

struct Sizes {
    Index batch, heads, queries, keys, head_dim, value_dim;
};

struct Strides {
    Index batch, head, row, column;
};
