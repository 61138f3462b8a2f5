// Products C = A B, or C += A B, of packed operands.
//
// Operands are packed into lanes of 32 bits along the dimension that the product sums over: a lane is one float, or two
// bfloat16. Three modes multiply lanes:
//   Float      fused multiply-add of floats; half-precision inputs are converted while they are packed
//   Bfloat     the dot products of AVX512-BF16
//   Tiled      the same by the tiles of AMX
// A is (m, k), row by row. B is (k, n) in panels of up to kPanel columns; each panel is k rows of the panel's width. m
// is a multiple of Mode::m_step, k one of Mode::k_step, and n one of kWidth. Tokens are padded to a multiple of
// Mode::step. Padding is zero.

#pragma once

#include "matrix.h"

#if HAS_BF16 && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

namespace {

constexpr Index kPanel = (kRegisters == 32 ? 4 : 3) * kWidth;  // columns of a panel of B

// The address of row l, columns j to j + kWidth - 1, of a packed B with k rows and n columns.
inline Lane *panel(Lane *b, Index k, Index n, Index l, Index j) {
    const Index start = j / kPanel * kPanel;
    return b + start * k + l * std::min(kPanel, n - start) + (j - start);
}

struct FloatLanes {
    static constexpr Index per_lane = 1, step = kWidth;
    static constexpr float most_sum = 0;  // always raise shifts: float32 is more exact for exponents near zero
    static constexpr float near = 0;
    // kWidth lanes along the columns of a row.
    template <class Element>
    static Lanes along(const Matrix<Element> &from, Index row, Index lane) {
        return as_lanes(from.floats(row, lane));
    }
    // kWidth columns of one lane along the rows.
    template <class Element>
    static Lanes across(const Matrix<Element> &from, Index lane, Index rows, Index column) {
        return lane < rows ? as_lanes(from.floats(lane, column)) : no_lanes();
    }
    static Vector exp2(Vector x) { return exp2_fine(x); }
};

#if HAS_BF16
struct BfloatLanes {
    static constexpr Index per_lane = 2, step = 32;
    static constexpr float most_sum = 65536;  // the sum of weights above which shifts are raised
    static constexpr float near = 1024;  // a shift up to this exponent rounds less than the weights do
    template <class Element>
    static Lanes along(const Matrix<Element> &from, Index row, Index lane) {
        return pairs(from, row, 2 * lane);
    }
    template <class Element>
    static Lanes across(const Matrix<Element> &from, Index lane, Index rows, Index column) {
        const Lanes even = 2 * lane < rows ? half(from, 2 * lane, column) : no_lanes();
        const Lanes odd = 2 * lane + 1 < rows ? half(from, 2 * lane + 1, column) : no_lanes();
        return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    static Vector exp2(Vector x) { return exp2_coarse(x); }
    static Lanes both(Vector low, Vector high) { return bfloat_pairs(low, high); }
    // Adds the rounded weights to a sum, so that a weight beside which all others vanish is equal to the sum.
    static Vector add_both(Vector sum, Lanes weights) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)all(Lane{0x3f803f80}));  // each times 1
    }
    static Lanes interleaved(Vector low, Vector high) { return interleaved_pairs(low, high); }

   private:
    // 32 columns of a row, unchanged, with zeros beyond the last column.
    template <class Element>
    static Lanes pairs(const Matrix<Element> &from, Index row, Index column) {
        const std::uint16_t *start = from.data + row * from.row_stride + column * from.column_stride;
        const Index count = std::min<Index>(32, from.columns - column);
        if (from.column_stride == 1)
            return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << std::max<Index>(count, 0)) - 1, start);
        alignas(64) std::uint16_t some[32] = {};
        for (Index i = 0; i < count; i++) some[i] = start[i * from.column_stride];
        return _mm512_load_si512(some);
    }
    template <class Element>
    static Lanes half(const Matrix<Element> &from, Index row, Index column) {
        return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(pairs(from, row, column)));
    }
};
#endif

struct Product {
    float *c;
    Index c_stride;
    const Lane *a;
    Index a_stride;
    const Lane *b;
    Index m, n, k;
    bool add;
    Index b_start = 0, b_rows = k;  // the first row to use of each panel of B, and the number of rows of a panel
    Index wanted = n;  // the columns of C that are wanted; later ones may be left as they are
    const Lane *panel(Index j) const { return b + j * b_rows + b_start * std::min(kPanel, n - j); }
};

// How many lanes are summed before the sum is added to C. Sums of short sums are more exact than one long sum, and this
// much of a panel of B stays in the first-level cache.
constexpr Index kSummed = kWidth == 16 ? 128 : 256;

// Loops over registers are unrolled by this pragma. GCC unrolls them too late otherwise, and keeps the sums on the
// stack.
#define UNROLLED _Pragma("GCC unroll 16")

// With `Half` only the first half of the last column of vectors is computed.
template <class Dot, int Rows, int Columns, bool Half>
inline void block(const Product &of, const Lane *a, const Lane *b, Index k, float *c, bool add) {
    constexpr Index width = kWidth * Columns, last = kWidth * (Columns - 1);
    constexpr int whole = Half ? Columns - 1 : Columns;
    Vector sums[Rows][Columns];
    HalfVector halves[Rows];
    UNROLLED for (int i = 0; i < Rows; i++) {
        UNROLLED for (int j = 0; j < whole; j++) sums[i][j] = zeros();
        if constexpr (Half) halves[i] = half_of(zeros());
    }
    for (Index l = 0; l < k; l++) {
        Lanes right[Columns];
        UNROLLED for (int j = 0; j < whole; j++) {
            right[j] = load(b + l * width + kWidth * j);
            keep_in_register(right[j]);
        }
        HalfLanes half;
        if constexpr (Half) half = load_half(b + l * width + last);
        UNROLLED for (int i = 0; i < Rows; i++) {
            const Lanes left = all(a[i * of.a_stride + l]);
            UNROLLED for (int j = 0; j < whole; j++) sums[i][j] = Dot::dot(sums[i][j], left, right[j]);
            if constexpr (Half) halves[i] = Dot::dot(halves[i], half_of(left), half);
        }
    }
    float *to = c;
    UNROLLED for (int i = 0; i < Rows; i++, to += of.c_stride) {
        UNROLLED for (int j = 0; j < whole; j++)
            store(to + kWidth * j, add ? load(to + kWidth * j) + sums[i][j] : sums[i][j]);
        if constexpr (Half) store_half(to + last, add ? load_half(to + last) + halves[i] : halves[i]);
    }
}

// So many rows at a time that the sums stay in registers. They take 24 of 32 registers, or 12 of 16; the others are for
// a row of B and a lane of A.
template <class Dot, int Rows, int Columns, bool Half>
inline void rows_of_panel(const Product &of, Index first_row, const Lane *a, const Lane *b, Index k, float *c, bool add) {
    Index i = first_row;
    for (; i + Rows <= of.m; i += Rows)
        block<Dot, Rows, Columns, Half>(of, a + i * of.a_stride, b, k, c + i * of.c_stride, add);
    if constexpr (Rows > 1)
        if (i < of.m) rows_of_panel<Dot, (Rows > 3 ? Rows / 2 : 1), Columns, Half>(of, i, a, b, k, c, add);
}

template <class Dot, bool Half>
inline void multiply_panel(const Product &of, Index j) {
    const Index width = std::min(kPanel, of.n - j);
    for (Index l = 0; l < of.k; l += kSummed) {
        const Index k = std::min(kSummed, of.k - l);
        const Lane *a = of.a + l, *b = of.panel(j) + l * width;
        const bool add = of.add || l > 0;
        if constexpr (kRegisters == 32) {
            switch (width / kWidth) {
                case 4: rows_of_panel<Dot, 6, 4, Half>(of, 0, a, b, k, of.c + j, add); break;
                case 3: rows_of_panel<Dot, 8, 3, Half>(of, 0, a, b, k, of.c + j, add); break;
                case 2: rows_of_panel<Dot, 12, 2, Half>(of, 0, a, b, k, of.c + j, add); break;
                default: rows_of_panel<Dot, 12, 1, Half>(of, 0, a, b, k, of.c + j, add);
            }
        } else {
            switch (width / kWidth) {
                case 3: rows_of_panel<Dot, 4, 3, Half>(of, 0, a, b, k, of.c + j, add); break;
                case 2: rows_of_panel<Dot, 6, 2, Half>(of, 0, a, b, k, of.c + j, add); break;
                default: rows_of_panel<Dot, 12, 1, Half>(of, 0, a, b, k, of.c + j, add);
            }
        }
    }
}

template <class Dot>
inline void multiply_by_vectors(const Product &of) {
    for (Index j = 0; j < of.n; j += kPanel) {
        if constexpr (HAS_HALVES)
            if (of.n - j <= kPanel && of.n - of.wanted >= kWidth / 2) {
                multiply_panel<Dot, true>(of, j);
                continue;
            }
        multiply_panel<Dot, false>(of, j);
    }
}

struct FloatMode : FloatLanes {
    // 240 is a multiple of 24, the columns of a panel with AVX2; 256 is not.
    static constexpr Index m_step = 1, k_step = 1, strip = 24, chunk = kRegisters == 32 ? 256 : 240, forward_keys = chunk,
                           block_queries = 128, block_keys = 480;
    template <class Sum, class Of>
    static Sum dot(Sum sum, Of a, Of b) {
        return fmadd(as_floats(a), as_floats(b), sum);
    }
    static void multiply(const Product &of) { multiply_by_vectors<FloatMode>(of); }
    static void begin() {}
    static void end() {}
};

#if HAS_BF16
struct BfloatMode : BfloatLanes {
    static constexpr Index m_step = 1, k_step = 1, strip = 24, chunk = 128, forward_keys = 256, block_queries = 128, block_keys = 480;
    static Vector dot(Vector sum, Lanes a, Lanes b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static HalfVector dot(HalfVector sum, HalfLanes a, HalfLanes b) {
        return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
    }
    static void multiply(const Product &of) { multiply_by_vectors<BfloatMode>(of); }
    static void begin() {}
    static void end() {}
};
#endif

#if HAS_AMX
struct TiledMode : BfloatLanes {
    // Why block_queries is 160: a tile is stored 16 rows at a time, and rows of 128 scores, a power of two, would fall
    // into few sets of the cache.
    static constexpr Index m_step = 16, k_step = 16, strip = 32, chunk = 64, forward_keys = 256, block_queries = 160, block_keys = 640;

    static void begin() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.rows[tile] = 16;
        _tile_loadconfig(&shapes);
    }
    static void end() { _tile_release(); }

    // Computes 32 by 32 sums in tiles 0 to 3, or 16 along a dimension that has no more left.
    template <bool TwoRows, bool TwoColumns>
    static void tiles(const Product &of, const Lane *a, const Lane *b, Index width, float *c) {
        const Index c_bytes = 4 * of.c_stride, a_bytes = 4 * of.a_stride, b_bytes = 4 * width;
        float *below = c + 16 * of.c_stride;
        if (of.add) {
            _tile_loadd(0, c, c_bytes);
            if (TwoColumns) _tile_loadd(1, c + 16, c_bytes);
            if (TwoRows) _tile_loadd(2, below, c_bytes);
            if (TwoRows && TwoColumns) _tile_loadd(3, below + 16, c_bytes);
        } else {
            _tile_zero(0);
            if (TwoColumns) _tile_zero(1);
            if (TwoRows) _tile_zero(2);
            if (TwoRows && TwoColumns) _tile_zero(3);
        }
        for (Index l = 0; l < of.k; l += 16) {
            _tile_loadd(4, a + l, a_bytes);
            _tile_loadd(6, b + l * width, b_bytes);
            _tile_dpbf16ps(0, 4, 6);
            if (TwoColumns) {
                _tile_loadd(7, b + l * width + 16, b_bytes);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (TwoRows) {
                _tile_loadd(5, a + 16 * of.a_stride + l, a_bytes);
                _tile_dpbf16ps(2, 5, 6);
                if (TwoColumns) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c, c_bytes);
        if (TwoColumns) _tile_stored(1, c + 16, c_bytes);
        if (TwoRows) _tile_stored(2, below, c_bytes);
        if (TwoRows && TwoColumns) _tile_stored(3, below + 16, c_bytes);
    }

    static void multiply(const Product &of) {
        for (Index j = 0; j < of.n; j += 32) {
            const Index start = j / kPanel * kPanel, width = std::min(kPanel, of.n - start);
            const Lane *b = of.panel(start) + (j - start);
            const bool two_columns = j + 32 <= of.n;
            for (Index i = 0; i < of.m; i += 32) {
                const Lane *a = of.a + i * of.a_stride;
                float *c = of.c + i * of.c_stride + j;
                if (i + 32 <= of.m)
                    two_columns ? tiles<true, true>(of, a, b, width, c) : tiles<true, false>(of, a, b, width, c);
                else
                    two_columns ? tiles<false, true>(of, a, b, width, c) : tiles<false, false>(of, a, b, width, c);
            }
        }
    }
};
#endif

// The passes work on whole vectors, chunks and blocks, so they rely on these conditions.
template <class Mode>
constexpr bool fits = Mode::step % kWidth == 0 && Mode::chunk % Mode::step == 0 && Mode::forward_keys % Mode::chunk == 0 &&
                      Mode::block_queries % Mode::step == 0 && Mode::block_keys % Mode::step == 0 &&
                      Mode::step % (Mode::per_lane * Mode::k_step) == 0 && Mode::strip % Mode::per_lane == 0;
static_assert(fits<FloatMode>);
#if HAS_BF16
static_assert(fits<BfloatMode>);
#endif
#if HAS_AMX
static_assert(fits<TiledMode> && TiledMode::strip % 16 == 0);
#endif

}  // namespace
