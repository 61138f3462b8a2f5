// Integer types, and how sizes are divided and rounded.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

using Index = std::int64_t;
using Lane = std::uint32_t;

constexpr Index ceil_div(Index size, Index parts) { return (size + parts - 1) / parts; }
constexpr Index round_up(Index size, Index multiple) { return ceil_div(size, multiple) * multiple; }

}  // namespace
