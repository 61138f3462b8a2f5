// Attention on x86-64 CPUs with AVX-512, forward and backward, in blocks that stay in a core's cache.
//
// The kernel for what PyTorch's operators cannot give: scores that never leave the cache in float32, and half precision
// that is rounded where SDPA rounds it and nowhere else. slicemod/native_library.py compiles this file for the machine
// it runs on and calls the functions at its end; nothing here allocates, the caller passes the workspace.
//
// All products are of one form, C (+)= A B, with operands packed in 32-bit lanes along the dimension that is summed: a
// lane is one float, or two bfloat16. Three modes multiply lanes:
//   Float      fused multiply-add of floats; half-precision inputs are converted while they are packed
//   Bfloat     the dot products of AVX512-BF16
//   Tiled      the same by the tiles of AMX
// A is (m, k) row by row. B is (k, n) in panels of up to 64 columns, each panel k rows of its own width. Sizes along n
// are multiples of 16, along k of Mode::k_step, tokens are padded to Mode::step; what is beyond the tensor is zero.
//
// Forward, for a block of queries and one block of keys after another, with a running softmax over the latter
// (arXiv 2112.05682, 2205.14135): S = Q K^T, P = 2^(c S - m), O = O 2^(m_old - m) + P V, c = scale log2(e).
// The shift m of a row is the maximum of the first scores. Weights in bfloat16 are as exact above 1 as below it, so m is
// raised to the maximum so far, and what was summed is scaled, only where weights have grown large.
// Backward, for a block of keys and one block of queries after another, transposed so that no product needs a
// transposed operand but small ones: S^T = K Q^T, P^T = 2^(c S^T - L), dP^T = V G^T, dS^T = P^T (dP^T - D),
// dV += P^T G, dK += dS^T Q, dQ^T += K^T dS^T, where G is the output's gradient, D = sum(G O) and L the base-2
// logarithm of the row's sum, kept by the forward pass.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif
#if defined(__AVX512BF16__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

// PyTorch has loaded its OpenMP runtime, whichever it is: its threads are taken by name, so that there are no others.
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
extern "C" int omp_get_thread_num();

namespace {

using Index = std::int64_t;
using Lane = std::uint32_t;
using Vector = __m512;

constexpr Index kPanel = 64;  // columns of a panel of B

Index ceil_div(Index size, Index parts) { return (size + parts - 1) / parts; }
Index round_up(Index size, Index multiple) { return ceil_div(size, multiple) * multiple; }
__mmask16 first(Index count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<Index>(count, 0)) - 1); }

// ---- element types of the tensors

struct Float32 {
    using Type = float;
    static constexpr bool is_bfloat = false;
    static Vector load(const float *from, __mmask16 some) { return _mm512_maskz_loadu_ps(some, from); }
    static void store(float *to, __mmask16 some, Vector values) { _mm512_mask_storeu_ps(to, some, values); }
};

struct Float16 {
    using Type = std::uint16_t;
    static constexpr bool is_bfloat = false;
    static Vector load(const Type *from, __mmask16 some) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from)); }
    static void store(Type *to, __mmask16 some, Vector values) {
        _mm256_mask_storeu_epi16(to, some, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
};

__m256i to_bfloat(Vector values) {
#if HAS_BF16
    return (__m256i)_mm512_cvtneps_pbh(values);
#else
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}

struct Bfloat16 {
    using Type = std::uint16_t;
    static constexpr bool is_bfloat = true;
    static Vector load(const Type *from, __mmask16 some) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16));
    }
    static void store(Type *to, __mmask16 some, Vector values) { _mm256_mask_storeu_epi16(to, some, to_bfloat(values)); }
};

// One head of a tensor: rows (tokens) by columns (channels).
template <class Element>
struct Matrix {
    using Type = typename Element::Type;
    Type *data;
    Index row_stride, column_stride, columns;

    Matrix from_row(Index start) const { return {data + start * row_stride, row_stride, column_stride, columns}; }

    // 16 columns of a row in float32, zeros beyond the last one.
    Vector floats(Index row, Index column) const {
        const Type *from = data + row * row_stride + column * column_stride;
        if (column_stride == 1) return Element::load(from, first(columns - column));
        alignas(64) Type some[16] = {};
        for (Index i = 0; i < std::min<Index>(16, columns - column); i++) some[i] = from[i * column_stride];
        return Element::load(some, 0xffff);
    }

    // 32 columns of a row as they are, zeros beyond the last one: of 16-bit elements.
    __m512i pairs(Index row, Index column) const {
        const Type *from = data + row * row_stride + column * column_stride;
        const Index count = std::min<Index>(32, columns - column);
        if (column_stride == 1)
            return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << std::max<Index>(count, 0)) - 1, from);
        alignas(64) Type some[32] = {};
        for (Index i = 0; i < count; i++) some[i] = from[i * column_stride];
        return _mm512_load_si512(some);
    }

    void set(Index row, Index column, Vector values) const {
        Type *to = data + row * row_stride + column * column_stride;
        if (column_stride == 1) return Element::store(to, first(columns - column), values);
        alignas(64) Type some[16];
        Element::store(some, 0xffff, values);
        for (Index i = 0; i < std::min<Index>(16, columns - column); i++) to[i * column_stride] = some[i];
    }
};

// ---- 2^x

// For weights that are rounded to bfloat16: a cubic of the fraction in [0, 1), within 8e-5 of it.
inline Vector exp2_coarse(Vector x) {
    const Vector f = _mm512_reduce_ps(x, 1);  // x - floor(x)
    Vector p = _mm512_set1_ps(0.07802449f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2260672f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583353f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
    return _mm512_scalef_ps(p, x);  // takes the floor itself
}

// Within 2e-8 before rounding: degree 6 of the fraction in [-1/2, 1/2].
inline Vector exp2_fine(Vector x) {
    const Vector f = _mm512_reduce_ps(x, 0);  // x - round(x)
    Vector p = _mm512_set1_ps(1.53458098e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33999312e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61848897e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55032878e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226469e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147206e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, f));
}

// ---- lanes

// 16 by 16 lanes, transposed in registers.
inline void transpose(__m512i (&rows)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    // rows[4 g + c] holds, in its 128-bit part p, column 4 p + c of rows 4 g .. 4 g + 3.
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xee);
        const __m512i d = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x44);
        const __m512i e = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xee);
        t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
    }
    for (int i = 0; i < 16; i++) rows[i] = t[i];
}

// Where row l of columns j .. j + 15 of a packed B with k rows and n columns begins.
inline Lane *panel(Lane *b, Index k, Index n, Index l, Index j) {
    const Index start = j / kPanel * kPanel;
    return b + start * k + l * std::min(kPanel, n - start) + (j - start);
}

struct FloatLanes {
    static constexpr Index per_lane = 1, step = 16;
    static constexpr float most_sum = 0;  // float32 is the more exact the nearer the exponents are to zero
    // 16 lanes along the columns of a row.
    template <class Element>
    static __m512i along(const Matrix<Element> &from, Index row, Index lane) {
        return _mm512_castps_si512(from.floats(row, lane));
    }
    // 16 columns of one lane along the rows.
    template <class Element>
    static __m512i across(const Matrix<Element> &from, Index lane, Index rows, Index column) {
        return lane < rows ? _mm512_castps_si512(from.floats(lane, column)) : _mm512_setzero_si512();
    }
    static Vector exp2(Vector x) { return exp2_fine(x); }
};

struct BfloatLanes {
    static constexpr Index per_lane = 2, step = 32;
    static constexpr float most_sum = 65536;  // of weights, before shifts are raised
    template <class Element>
    static __m512i along(const Matrix<Element> &from, Index row, Index lane) {
        return from.pairs(row, 2 * lane);
    }
    template <class Element>
    static __m512i across(const Matrix<Element> &from, Index lane, Index rows, Index column) {
        const __m512i even = 2 * lane < rows ? half(from, 2 * lane, column) : _mm512_setzero_si512();
        const __m512i odd = 2 * lane + 1 < rows ? half(from, 2 * lane + 1, column) : _mm512_setzero_si512();
        return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    static Vector exp2(Vector x) { return exp2_coarse(x); }

   private:
    template <class Element>
    static __m512i half(const Matrix<Element> &from, Index row, Index column) {
        return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(from.pairs(row, column)));
    }
};

// ---- C (+)= A B

struct Product {
    float *c;
    Index c_stride;
    const Lane *a;
    Index a_stride;
    const Lane *b;
    Index m, n, k;
    bool add;
    Index b_start = 0, b_rows = k;  // the first row to take of a panel of B, and how many a panel has
    const Lane *panel(Index j) const { return b + j * b_rows + b_start * std::min(kPanel, n - j); }
};

// Lanes that are summed before the sum is added to C: sums of sums are more exact than one long sum, and so much of a
// panel of B stays in the first-level cache.
constexpr Index kSummed = 128;

template <class Dot, int Rows, int Columns>
inline void block(const Product &of, const Lane *a, const Lane *b, Index k, float *c, bool add) {
    constexpr Index width = 16 * Columns;
    Vector sums[Rows][Columns] = {};
    for (Index l = 0; l < k; l++) {
        __m512i right[Columns];
        for (int j = 0; j < Columns; j++) right[j] = _mm512_loadu_si512(b + l * width + 16 * j);
        for (int i = 0; i < Rows; i++) {
            const __m512i left = _mm512_set1_epi32(static_cast<int>(a[i * of.a_stride + l]));
            for (int j = 0; j < Columns; j++) sums[i][j] = Dot::dot(sums[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < Rows; i++)
        for (int j = 0; j < Columns; j++) {
            float *to = c + i * of.c_stride + 16 * j;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) : sums[i][j]);
        }
}

// Some rows at a time that leave the sums in registers: 24 of them, beside a row of B and a lane of A.
template <class Dot, int Rows, int Columns>
inline void rows_of_panel(const Product &of, Index first_row, const Lane *a, const Lane *b, Index k, float *c, bool add) {
    Index i = first_row;
    for (; i + Rows <= of.m; i += Rows)
        block<Dot, Rows, Columns>(of, a + i * of.a_stride, b, k, c + i * of.c_stride, add);
    if constexpr (Rows > 1)
        if (i < of.m) rows_of_panel<Dot, (Rows > 3 ? Rows / 2 : 1), Columns>(of, i, a, b, k, c, add);
}

template <class Dot>
inline void multiply_by_vectors(const Product &of) {
    for (Index j = 0; j < of.n; j += kPanel) {
        const Index width = std::min(kPanel, of.n - j);
        for (Index l = 0; l < of.k; l += kSummed) {
            const Index k = std::min(kSummed, of.k - l);
            const Lane *a = of.a + l, *b = of.panel(j) + l * width;
            const bool add = of.add || l > 0;
            switch (width / 16) {
                case 4: rows_of_panel<Dot, 6, 4>(of, 0, a, b, k, of.c + j, add); break;
                case 3: rows_of_panel<Dot, 8, 3>(of, 0, a, b, k, of.c + j, add); break;
                case 2: rows_of_panel<Dot, 12, 2>(of, 0, a, b, k, of.c + j, add); break;
                default: rows_of_panel<Dot, 12, 1>(of, 0, a, b, k, of.c + j, add);
            }
        }
    }
}

struct FloatMode : FloatLanes {
    static constexpr Index k_step = 1, strip = 24, chunk = 256, block_queries = 128, block_keys = 480;
    static Vector dot(Vector sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static void multiply(const Product &of) { multiply_by_vectors<FloatMode>(of); }
    static void begin() {}
    static void end() {}
};

#if HAS_BF16
struct BfloatMode : BfloatLanes {
    static constexpr Index k_step = 1, strip = 24, chunk = 128, block_queries = 128, block_keys = 480;
    static Vector dot(Vector sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static void multiply(const Product &of) { multiply_by_vectors<BfloatMode>(of); }
    static void begin() {}
    static void end() {}
};
#endif

#if HAS_AMX
struct TiledMode : BfloatLanes {
    // Of the backward pass: rows of 128 scores, a power of two, would crowd in few sets of the cache, as a tile is
    // stored 16 rows at a time.
    static constexpr Index k_step = 16, strip = 32, chunk = 64, block_queries = 160, block_keys = 640;

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

    // 32 by 32 sums in tiles 0 to 3, or 16 where fewer rows or columns are left.
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

// ---- packing

// Lanes of so many columns where these are summed over.
template <class Mode>
Index lanes_of(Index columns) {
    return round_up(ceil_div(columns, Mode::per_lane), Mode::k_step);
}

// Rows as A: (rows, lanes), with `padded` rows.
template <class Mode, class Element>
void pack_rows(Lane *to, Index lanes, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    for (Index row = 0; row < padded; row++)
        for (Index lane = 0; lane < lanes; lane += 16) {
            const __m512i some = row < rows ? Mode::along(from, start + row, lane) : _mm512_setzero_si512();
            _mm512_mask_storeu_epi32(to + row * lanes + lane, first(lanes - lane), some);
        }
}

// Rows as the columns of B: (lanes, padded rows), the rows' transpose.
template <class Mode, class Element>
void pack_columns(Lane *to, Index lanes, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    for (Index row = 0; row < padded; row += 16)
        for (Index lane = 0; lane < lanes; lane += 16) {
            __m512i some[16];
            for (int i = 0; i < 16; i++)
                some[i] = row + i < rows ? Mode::along(from, start + row + i, lane) : _mm512_setzero_si512();
            transpose(some);
            for (int i = 0; i < std::min<Index>(16, lanes - lane); i++)
                _mm512_storeu_si512(panel(to, lanes, padded, lane + i, row), some[i]);
        }
}

// Rows as B: lanes along `padded` rows, by `columns` columns.
template <class Mode, class Element>
void pack_lanes(Lane *to, Index columns, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    const Index lanes = padded / Mode::per_lane;
    const Matrix<Element> part = from.from_row(start);
    for (Index column = 0; column < columns; column += 16)
        for (Index lane = 0; lane < lanes; lane++)
            _mm512_storeu_si512(panel(to, lanes, columns, lane, column), Mode::across(part, lane, rows, column));
}

// Rows as the lanes of A: (columns, lanes along padded rows).
template <class Mode, class Element>
void pack_transposed(Lane *to, Index columns, const Matrix<Element> &from, Index start, Index rows, Index padded) {
    const Index lanes = padded / Mode::per_lane;
    const Matrix<Element> part = from.from_row(start);
    for (Index column = 0; column < columns; column += 16)
        for (Index lane = 0; lane < lanes; lane += 16) {
            __m512i some[16];
            for (int i = 0; i < 16; i++) some[i] = Mode::across(part, lane + i, rows, column);
            transpose(some);
            for (int i = 0; i < 16; i++)
                _mm512_mask_storeu_epi32(to + (column + i) * lanes + lane, first(lanes - lane), some[i]);
        }
}

// Brings a row into the second-level cache, while others are worked on.
template <class Element>
void prefetch(const Matrix<Element> &of, Index row) {
    const char *start = reinterpret_cast<const char *>(of.data + row * of.row_stride);
    for (Index j = 0; j < of.columns * static_cast<Index>(sizeof(*of.data)); j += 64)
        _mm_prefetch(start + j, _MM_HINT_T1);
}

// ---- what a call is about

}  // namespace

struct Sizes {
    Index batch, heads, queries, keys, head_dim, value_dim;
};

struct Strides {
    Index batch, head, row, column;
};

namespace {

template <class Element>
Matrix<Element> head_of(void *data, const Strides &strides, Index batch, Index head, Index columns) {
    using Type = typename Element::Type;
    Type *start = static_cast<Type *>(data) + batch * strides.batch + head * strides.head;
    return {start, strides.row, strides.column, columns};
}

// Calls body(unit, thread) for each unit on that many threads. Each thread has a range of units, and helps with others'
// when it is done: units side by side write to the same cache lines, where heads are not as wide as whole ones.
template <class Body>
void parallel(Index units, Index threads, const Body &body) {
    constexpr Index kMostRanges = 64;
    struct Shared {
        const Body &body;
        Index units, ranges;
        struct alignas(64) {
            std::atomic<Index> next;
        } range[kMostRanges];
        Index start(Index of) const { return units * of / ranges; }
    } shared{body, units, std::min({threads, units, kMostRanges}), {}};
    for (Index i = 0; i < shared.ranges; i++) shared.range[i].next = shared.start(i);
    GOMP_parallel(
        [](void *data) {
            Shared &of = *static_cast<Shared *>(data);
            const Index thread = omp_get_thread_num();
            of.body.begin();
            for (Index turn = 0; turn < of.ranges; turn++) {
                const Index i = (thread + turn) % of.ranges, end = of.start(i + 1);
                for (Index unit; (unit = of.range[i].next.fetch_add(1)) < end;) of.body(unit, thread);
            }
            of.body.end();
        },
        &shared, static_cast<unsigned>(std::min(threads, units)), 0);
}

// Hands out parts of a workspace, each at a cache line of its own; without memory it only counts.
struct Arena {
    char *memory;
    Index used = 0;
    template <class Type>
    Type *take(Index count) {
        Type *part = reinterpret_cast<Type *>(memory + used);
        used += round_up(count * static_cast<Index>(sizeof(Type)), 64);
        return part;
    }
};

// Rows of scores that are computed together: more for wide heads, whose packed keys and values leave the cache.
template <class Mode>
Index strip_of(const Sizes &sizes) {
    return Mode::strip * (std::max(sizes.head_dim, sizes.value_dim) > 160 ? 2 : 1);
}

// ---- forward

// A block of queries is as large as leaves some for every thread: keys and values are packed anew for each.
constexpr Index kMostQueries = 1024, kLeastQueries = 128, kBlocksOfThread = 4, kForwardKeys = 256;

template <class Mode>
struct Forward {
    const Sizes sizes;
    Index strip, queries, keys, chunk, head_lanes, value_columns;
    struct Space {
        Lane *query, *key, *value, *weights;
        float *scores, *output, *shifts, *sums, *new_sums;
    };

    Forward(const Sizes &of, Index threads) : sizes(of) {
        strip = strip_of<Mode>(of);
        Index most = kMostQueries;
        while (most > kLeastQueries && of.batch * of.heads * ceil_div(of.queries, most) < kBlocksOfThread * threads)
            most /= 2;
        queries = std::min(round_up(most, std::lcm<Index>(strip, 16)), round_up(of.queries, 16));
        keys = std::min(kForwardKeys, round_up(of.keys, Mode::step));
        chunk = std::min(Mode::chunk, keys);
        head_lanes = lanes_of<Mode>(of.head_dim);
        value_columns = round_up(of.value_dim, 16);
    }
    Space carve(Arena &arena) const {
        return {arena.take<Lane>(queries * head_lanes), arena.take<Lane>(keys * head_lanes),
                arena.take<Lane>(keys / Mode::per_lane * value_columns),
                arena.take<Lane>(strip * keys / Mode::per_lane), arena.take<float>(strip * chunk),
                arena.take<float>(queries * value_columns), arena.take<float>(queries),
                arena.take<float>(queries * 16), arena.take<float>(strip * 16)};
    }
    Index bytes() const {
        Arena arena{nullptr};
        carve(arena);
        return arena.used;
    }

    // Raises the shifts of some queries to the maxima of a chunk of scores, and scales what was summed by then to them.
    void raise_shifts(const Space &space, Index width, Index start, Index rows, float c, float *sums,
                      bool has_output) const {
        alignas(64) float maxima[64];
        for (Index row = 0; row < rows; row++) {
            const float *scores = space.scores + row * width;
            Vector most = _mm512_loadu_ps(scores), other = most;
            Index j = 16;
            for (; j + 32 <= width; j += 32) {
                most = _mm512_max_ps(_mm512_loadu_ps(scores + j), most);
                other = _mm512_max_ps(_mm512_loadu_ps(scores + j + 16), other);
            }
            for (; j < width; j += 16) most = _mm512_max_ps(_mm512_loadu_ps(scores + j), most);
            maxima[row] = _mm512_reduce_max_ps(_mm512_max_ps(most, other));
        }
        for (Index row = 0; row < rows; row += 16) {
            const __mmask16 some = first(rows - row);
            const Vector old = _mm512_maskz_loadu_ps(some, space.shifts + start + row);
            const Vector most = _mm512_mul_ps(_mm512_load_ps(maxima + row), _mm512_set1_ps(c));
            const Vector now = _mm512_max_ps(most, old);
            _mm512_mask_storeu_ps(space.shifts + start + row, some, now);
            _mm512_store_ps(maxima + row, exp2_fine(_mm512_sub_ps(old, now)));
        }
        for (Index row = 0; row < rows; row++) {
            if (maxima[row] == 1) continue;
            const Vector by = _mm512_set1_ps(maxima[row]);
            _mm512_storeu_ps(sums + row * 16, _mm512_mul_ps(_mm512_loadu_ps(sums + row * 16), by));
            float *output = space.output + (start + row) * value_columns;
            for (Index j = 0; has_output && j < value_columns; j += 16)
                _mm512_storeu_ps(output + j, _mm512_mul_ps(_mm512_loadu_ps(output + j), by));
        }
    }

    // Weights of a chunk of scores. `sums` and these weights become `new_sums`, the largest of which is returned.
    template <class Width>
    float weigh(const Space &space, Width width, Index lane, Index lanes, Index start, Index rows, float c,
                const float *sums, float *new_sums) const {
        const Vector factor = _mm512_set1_ps(c);
        Vector most = _mm512_setzero_ps();
        for (Index row = 0; row < rows; row++) {
            const float *scores = space.scores + row * width;
            const Vector shift = _mm512_set1_ps(space.shifts[start + row]);
            Vector sum = _mm512_loadu_ps(sums + row * 16);
            Lane *weights = space.weights + row * lanes + lane;
            if constexpr (Mode::per_lane == 1) {
                for (Index j = 0; j < width; j += 16) {
                    const Vector p = Mode::exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), factor, shift));
                    sum = _mm512_add_ps(sum, p);
                    _mm512_storeu_ps(reinterpret_cast<float *>(weights) + j, p);
                }
            } else {
                Vector more = _mm512_setzero_ps();
                for (Index j = 0; j < width; j += 32) {
                    const Vector p = Mode::exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), factor, shift));
                    const Vector q = Mode::exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j + 16), factor, shift));
                    sum = _mm512_add_ps(sum, p);
                    more = _mm512_add_ps(more, q);
                    _mm512_storeu_si512(weights + j / 2, both(p, q));
                }
                sum = _mm512_add_ps(sum, more);
            }
            _mm512_storeu_ps(new_sums + row * 16, sum);
            most = _mm512_max_ps(sum, most);  // of a sum that is not a number, `most`
        }
        return _mm512_reduce_max_ps(most);
    }

    static __m512i both(Vector low, Vector high) {
#if HAS_BF16
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
        return _mm512_inserti64x4(_mm512_castsi256_si512(to_bfloat(low)), to_bfloat(high), 1);
#endif
    }

    template <class Element>
    void attend(const Space &space, const Matrix<Element> &query, const Matrix<Element> &key,
                const Matrix<Element> &value, const Matrix<Element> &output, float *logsumexp, Index start,
                float c) const {
        const Index rows = std::min(queries, sizes.queries - start);
        const Index padded_rows = round_up(rows, 16);
        pack_rows<Mode>(space.query, head_lanes, query, start, rows, padded_rows);
        std::fill(space.shifts, space.shifts + padded_rows, -std::numeric_limits<float>::max());
        std::fill(space.sums, space.sums + padded_rows * 16, 0.0f);
        const Index keys_of_strip = ceil_div(keys, ceil_div(padded_rows, strip));
        for (Index from = 0; from < sizes.keys; from += keys) {
            const Index count = std::min(keys, sizes.keys - from);
            const Index padded = round_up(count, Mode::step), lanes = padded / Mode::per_lane;
            Index ahead = from + keys;
            pack_columns<Mode>(space.key, head_lanes, key, from, count, padded);
            pack_lanes<Mode>(space.value, value_columns, value, from, count, padded);
            for (Index row = 0; row < padded_rows; row += strip) {
                const Index some = std::min(strip, padded_rows - row);
                for (const Index end = std::min(ahead + keys_of_strip, sizes.keys); ahead < end; ahead++) {
                    prefetch(key, ahead);
                    prefetch(value, ahead);
                }
                float *sums = space.sums + row * 16, *new_sums = space.new_sums;
                Index multiplied = 0;  // keys of the block
                const auto multiply = [&](Index end) {
                    const Index lane = multiplied / Mode::per_lane;
                    Mode::multiply({space.output + row * value_columns, value_columns, space.weights + lane, lanes,
                                    space.value, some, value_columns, end / Mode::per_lane - lane,
                                    from + multiplied > 0, lane, lanes});
                    multiplied = end;
                };
                for (Index j = 0; j < padded; j += chunk) {
                    const Index width = std::min(chunk, padded - j);
                    Mode::multiply({space.scores, width, space.query + row * head_lanes, head_lanes,
                                    space.key + j * head_lanes, some, width, head_lanes, false});
                    for (Index i = 0; count < j + width && i < some; i++)
                        std::fill(space.scores + i * width + (count - j), space.scores + (i + 1) * width, -INFINITY);
                    const auto raise = [&] {
                        if (multiplied < j) multiply(j);
                        raise_shifts(space, width, row, some, c, sums, from + multiplied > 0);
                    };
                    const auto weigh_chunk = [&](auto columns) {
                        return weigh(space, columns, j / Mode::per_lane, lanes, row, some, c, sums, new_sums);
                    };
                    // A loop of a length that the compiler knows is unrolled.
                    const auto weigh_all = [&] {
                        return width == Mode::chunk ? weigh_chunk(std::integral_constant<Index, Mode::chunk>{})
                                                    : weigh_chunk(width);
                    };
                    if (from + j == 0 || !Mode::most_sum) raise();
                    if (weigh_all() > Mode::most_sum && Mode::most_sum) {
                        raise();
                        weigh_all();
                    }
                    std::swap(sums, new_sums);
                }
                multiply(padded);
                if (sums == space.new_sums) std::copy(sums, sums + some * 16, space.sums + row * 16);
            }
        }
        for (Index row = 0; row < rows; row++) {
            float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(space.sums + row * 16));
            const bool dead = sum == 0;  // no key that the query may look at
            const Vector by = _mm512_set1_ps(dead ? 0 : 1 / sum);
            for (Index j = 0; j < sizes.value_dim; j += 16)
                output.set(start + row, j, _mm512_mul_ps(_mm512_loadu_ps(space.output + row * value_columns + j), by));
            if (logsumexp) logsumexp[start + row] = dead ? 0 : space.shifts[row] + std::log2(sum);
        }
    }
};

// ---- backward

template <class Mode>
struct Backward {
    const Sizes sizes;
    Index threads, strip, parts, queries, keys, head_lanes, value_lanes, head_columns, value_columns;
    struct Space {
        Lane *key, *key_transposed, *value;                      // a block of keys
        float *grad_key, *grad_value;
        Lane *query_columns, *query_lanes, *grad_columns, *grad_lanes;  // a block of queries
        float *logsumexp, *delta;
        float *scores, *grad_weights;                                   // both, some keys at a time
        Lane *weights, *grad_scores, *grad_score_lanes;
    };

    // Heads are shared out; one is shared by several threads where there are too few.
    Backward(const Sizes &of, Index on_threads) : sizes(of), threads(on_threads) {
        const Index heads = of.batch * of.heads;
        parts = heads % threads == 0 || heads >= 4 * threads ? 1 : ceil_div(2 * threads, heads);
        strip = strip_of<Mode>(of);
        queries = std::min(Mode::block_queries, round_up(of.queries, Mode::step));
        keys = std::min(Mode::block_keys, round_up(of.keys, Mode::step));
        parts = std::min(parts, ceil_div(of.keys, keys));
        head_lanes = lanes_of<Mode>(of.head_dim);
        value_lanes = lanes_of<Mode>(of.value_dim);
        head_columns = round_up(of.head_dim, 16);
        value_columns = round_up(of.value_dim, 16);
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
        space.logsumexp = arena.take<float>(queries);
        space.delta = arena.take<float>(queries);
        space.scores = arena.take<float>(strip * queries);
        space.grad_weights = arena.take<float>(strip * queries);
        space.weights = arena.take<Lane>(strip * queries / per_lane);
        space.grad_scores = arena.take<Lane>(strip * queries / per_lane);
        space.grad_score_lanes = arena.take<Lane>(keys / per_lane * queries);
        return space;
    }
    // Of the gradients of all queries of a head, transposed, a block of queries after another.
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

    // P^T and dS^T of `some` keys, the first of them at `start` of the block, by a block of queries.
    void weigh(const Space &space, Index start, Index some, Index count, Index padded, Index width, float c) const {
        const Vector factor = _mm512_set1_ps(c);
        const Index lanes = width / Mode::per_lane, key_lanes = padded / Mode::per_lane;
        if constexpr (Mode::per_lane == 1) {
            for (Index row = 0; row < some; row++)
                for (Index j = 0; j < width; j += 16) {
                    Vector p = _mm512_setzero_ps(), ds = p;
                    if (start + row < count) weigh(space, row * width + j, j, factor, p, ds);
                    _mm512_storeu_ps(reinterpret_cast<float *>(space.weights) + row * lanes + j, p);
                    _mm512_storeu_ps(reinterpret_cast<float *>(space.grad_scores) + row * lanes + j, ds);
                    Lane *to = panel(space.grad_score_lanes, key_lanes, width, start + row, j);
                    _mm512_storeu_ps(reinterpret_cast<float *>(to), ds);
                }
        } else {
            const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            for (Index row = 0; row < some; row += 2)
                for (Index j = 0; j < width; j += 32) {
                    Vector p[2][2] = {}, ds[2][2] = {};
                    for (int i = 0; i < 2; i++)
                        if (start + row + i < count) {
                            weigh(space, (row + i) * width + j, j, factor, p[i][0], ds[i][0]);
                            weigh(space, (row + i) * width + j + 16, j + 16, factor, p[i][1], ds[i][1]);
                        }
                    for (int i = 0; i < 2; i++) {
                        const Index at = (row + i) * lanes + j / 2;
                        _mm512_storeu_si512(space.weights + at, Forward<Mode>::both(p[i][0], p[i][1]));
                        _mm512_storeu_si512(space.grad_scores + at, Forward<Mode>::both(ds[i][0], ds[i][1]));
                    }
                    Lane *to = panel(space.grad_score_lanes, key_lanes, width, (start + row) / 2, j);
                    for (int i = 0; i < 2; i++)
                        _mm512_storeu_si512(to + 16 * i, _mm512_permutexvar_epi16(
                                                             interleave, Forward<Mode>::both(ds[0][i], ds[1][i])));
                }
        }
    }
    void weigh(const Space &space, Index at, Index j, Vector factor, Vector &p, Vector &ds) const {
        const Vector s = _mm512_loadu_ps(space.scores + at), dp = _mm512_loadu_ps(space.grad_weights + at);
        p = Mode::exp2(_mm512_fmsub_ps(s, factor, _mm512_loadu_ps(space.logsumexp + j)));
        ds = _mm512_mul_ps(p, _mm512_sub_ps(dp, _mm512_loadu_ps(space.delta + j)));
    }

    // Gradients of the keys of one unit, and what these keys add to those of all queries.
    template <class Element>
    void differentiate(const Space &space, float *grad_query, const Matrix<Element> &query, const Matrix<Element> &key,
                       const Matrix<Element> &value, const Matrix<Element> &grad, const float *logsumexp,
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
                for (Index j = 0; j < width; j += 16) {
                    const __mmask16 some = first(rows - j);
                    // No weight for what is no query.
                    _mm512_storeu_ps(space.logsumexp + j, _mm512_mask_loadu_ps(_mm512_set1_ps(INFINITY), some,
                                                                               logsumexp + start + j));
                    _mm512_storeu_ps(space.delta + j, _mm512_maskz_loadu_ps(some, delta + start + j));
                }
                for (Index row = 0; row < padded; row += strip) {
                    const Index some = std::min(strip, padded - row);
                    Mode::multiply({space.scores, width, space.key + row * head_lanes, head_lanes, space.query_columns,
                                    some, width, head_lanes, false});
                    Mode::multiply({space.grad_weights, width, space.value + row * value_lanes, value_lanes,
                                    space.grad_columns, some, width, value_lanes, false});
                    // What is no query has no scores, not even against a key that is infinite.
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
            const Vector by = _mm512_set1_ps(scale);
            for (Index row = 0; row < count; row++) {
                for (Index j = 0; grad_key.data && j < sizes.head_dim; j += 16)
                    grad_key.set(from + row, j,
                                 _mm512_mul_ps(_mm512_loadu_ps(space.grad_key + row * head_columns + j), by));
                for (Index j = 0; grad_value.data && j < sizes.value_dim; j += 16)
                    grad_value.set(from + row, j, _mm512_loadu_ps(space.grad_value + row * value_columns + j));
            }
        }
    }

    // Write the gradients of a head's queries, the sum of `count` transposed parts.
    template <class Element>
    void settle(const Matrix<Element> &to, const float *parts_of, Index count, Index stride, float scale) const {
        for (Index start = 0; start < sizes.queries; start += queries) {
            const Index rows = std::min(queries, sizes.queries - start), width = round_up(rows, Mode::step);
            for (Index column = 0; column < head_columns; column += 16)
                for (Index row = 0; row < rows; row += 16) {
                    __m512i some[16];
                    for (int i = 0; i < 16; i++) {
                        const float *from = parts_of + start * head_columns + (column + i) * width + row;
                        Vector sum = _mm512_loadu_ps(from);
                        for (Index part = 1; part < count; part++)
                            sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + part * stride));
                        some[i] = _mm512_castps_si512(_mm512_mul_ps(sum, _mm512_set1_ps(scale)));
                    }
                    transpose(some);
                    for (Index i = 0; i < std::min<Index>(16, rows - row); i++)
                        to.set(start + row + i, column, _mm512_castsi512_ps(some[i]));
                }
        }
    }
};

// ---- calls

struct Call {
    Sizes sizes;
    Strides query, key, value, output, grad_output, grad_query, grad_key, grad_value;
    float scale;
    Index threads;
};

template <class Mode, class Element>
void forward(const Call &call, void *query, void *key, void *value, void *output, float *logsumexp, char *memory) {
    const Forward<Mode> kernel(call.sizes, call.threads);
    const Sizes &sizes = call.sizes;
    const Index blocks = ceil_div(sizes.queries, kernel.queries), bytes = kernel.bytes();
    struct Body {
        const Call &call;
        const Forward<Mode> &kernel;
        void *query, *key, *value, *output;
        float *logsumexp;
        char *memory;
        Index blocks, bytes;
        void begin() const { Mode::begin(); }
        void end() const { Mode::end(); }
        void operator()(Index unit, Index thread) const {
            // Of all heads some blocks before the others, so that threads take rows apart where there are enough of these.
            const Sizes &sizes = call.sizes;
            const Index some = blocks / std::gcd(blocks, call.threads), heads = sizes.batch * sizes.heads;
            const Index block = unit / (heads * some) * some + unit % some;
            const Index head = unit / some % heads, b = head / sizes.heads, h = head % sizes.heads;
            Arena arena{memory + thread * bytes};
            kernel.attend(kernel.carve(arena), head_of<Element>(query, call.query, b, h, sizes.head_dim),
                          head_of<Element>(key, call.key, b, h, sizes.head_dim),
                          head_of<Element>(value, call.value, b, h, sizes.value_dim),
                          head_of<Element>(output, call.output, b, h, sizes.value_dim),
                          logsumexp ? logsumexp + head * sizes.queries : nullptr, block * kernel.queries,
                          call.scale * static_cast<float>(M_LOG2E));
        }
    };
    parallel(sizes.batch * sizes.heads * blocks, call.threads,
             Body{call, kernel, query, key, value, output, logsumexp, memory, blocks, bytes});
}

template <class Mode, class Element>
void backward(const Call &call, void *grad_output, void *query, void *key, void *value, void *output,
              float *logsumexp, void *grad_query, void *grad_key, void *grad_value, float *delta, char *memory) {
    const Backward<Mode> kernel(call.sizes, call.threads);
    struct Body {
        const Call &call;
        const Backward<Mode> &kernel;
        void *grad_output, *query, *key, *value, *output;
        float *logsumexp;
        void *grad_query, *grad_key, *grad_value;
        float *delta;
        char *memory;
        enum Stage { Deltas, Gradients, Sums } stage;
        void begin() const { Mode::begin(); }
        void end() const { Mode::end(); }

        float *grad_query_buffer(Index which) const {
            const Index spaces = std::min(kernel.threads, kernel.units()) * kernel.thread_bytes();
            return reinterpret_cast<float *>(memory + spaces + which * round_up(kernel.grad_query_floats() * 4, 64));
        }
        Matrix<Element> matrix(void *data, const Strides &strides, Index head, Index columns) const {
            if (!data) return {nullptr, 0, 0, 0};
            return head_of<Element>(data, strides, head / call.sizes.heads, head % call.sizes.heads, columns);
        }
        void operator()(Index unit, Index thread) const {
            const Sizes &sizes = call.sizes;
            const Index head = stage == Gradients ? unit / kernel.parts : unit;
            const Matrix<Element> grad = matrix(grad_output, call.grad_output, head, sizes.value_dim);
            const Matrix<Element> to = matrix(grad_query, call.grad_query, head, sizes.head_dim);
            float *deltas = delta + head * sizes.queries;
            if (stage == Deltas) {
                const Matrix<Element> out = matrix(output, call.output, head, sizes.value_dim);
                for (Index row = 0; row < sizes.queries; row++) {
                    Vector sum = _mm512_setzero_ps();
                    for (Index j = 0; j < sizes.value_dim; j += 16)
                        sum = _mm512_fmadd_ps(grad.floats(row, j), out.floats(row, j), sum);
                    deltas[row] = _mm512_reduce_add_ps(sum);
                }
                return;
            }
            if (stage == Sums) {
                kernel.settle(to, grad_query_buffer(head * kernel.parts), kernel.parts,
                              round_up(kernel.grad_query_floats() * 4, 64) / 4, call.scale);
                return;
            }
            Arena arena{memory + thread * kernel.thread_bytes()};
            float *sums = grad_query_buffer(kernel.parts > 1 ? unit : thread);
            kernel.differentiate(kernel.carve(arena), sums, matrix(query, call.query, head, sizes.head_dim),
                                 matrix(key, call.key, head, sizes.head_dim),
                                 matrix(value, call.value, head, sizes.value_dim), grad,
                                 logsumexp + head * sizes.queries, deltas,
                                 matrix(grad_key, call.grad_key, head, sizes.head_dim),
                                 matrix(grad_value, call.grad_value, head, sizes.value_dim), unit % kernel.parts,
                                 call.scale);
            if (kernel.parts == 1 && to.data) kernel.settle(to, sums, 1, 0, call.scale);
        }
    } body{call,       kernel,     grad_output, query, key, value, output, logsumexp, grad_query, grad_key,
           grad_value, delta, memory, Body::Deltas};
    const Index heads = call.sizes.batch * call.sizes.heads;
    parallel(heads, call.threads, body);
    body.stage = Body::Gradients;
    parallel(kernel.units(), call.threads, body);
    body.stage = Body::Sums;
    if (kernel.parts > 1 && grad_query) parallel(heads, call.threads, body);
}

enum Modes { kFloat = 0, kBfloat = 1, kTiled = 2 };
enum Elements { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Calls run(Mode, Element) for those that this library has.
template <class Run>
bool dispatch(int mode, int element, const Run &run) {
    if (mode == kFloat) {
        if (element == kFloat32) return run(FloatMode{}, Float32{}), true;
        if (element == kFloat16) return run(FloatMode{}, Float16{}), true;
        return run(FloatMode{}, Bfloat16{}), true;
    }
#if HAS_BF16
    if (mode == kBfloat && element == kBfloat16) return run(BfloatMode{}, Bfloat16{}), true;
#endif
#if HAS_AMX
    if (mode == kTiled && element == kBfloat16) return run(TiledMode{}, Bfloat16{}), true;
#endif
    return false;
}

}  // namespace

extern "C" {

// The best mode for bfloat16 that this processor has and the system lets us use.
int slicemod_best_mode() {
#if HAS_AMX
    constexpr int kRequest = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return kTiled;
#endif
    return HAS_BF16 ? kBfloat : kFloat;
}

// Queries of a slice.
Index slicemod_forward_rows(int mode, int element, const Call *call) {
    Index rows = -1;
    dispatch(mode, element, [&](auto m, auto) {
        rows = std::min(Forward<decltype(m)>(call->sizes, call->threads).queries, call->sizes.queries);
    });
    return rows;
}

// Bytes of the workspace that the pass needs.
Index slicemod_forward_bytes(int mode, int element, const Call *call) {
    Index bytes = -1;
    dispatch(mode, element, [&](auto m, auto) {
        const Forward<decltype(m)> kernel(call->sizes, call->threads);
        const Index units = call->sizes.batch * call->sizes.heads * ceil_div(call->sizes.queries, kernel.queries);
        bytes = std::min(call->threads, units) * kernel.bytes();
    });
    return bytes;
}

Index slicemod_backward_bytes(int mode, int element, const Call *call) {
    Index bytes = -1;
    dispatch(mode, element, [&](auto m, auto) { bytes = Backward<decltype(m)>(call->sizes, call->threads).bytes(); });
    return bytes;
}

int slicemod_forward(int mode, int element, const Call *call, void *query, void *key, void *value, void *output,
                     float *logsumexp, char *memory) {
    return dispatch(mode, element, [&](auto m, auto e) {
        forward<decltype(m), decltype(e)>(*call, query, key, value, output, logsumexp, memory);
    });
}

int slicemod_backward(int mode, int element, const Call *call, void *grad_output, void *query, void *key, void *value,
                      void *output, float *logsumexp, void *grad_query, void *grad_key, void *grad_value, float *delta,
                      char *memory) {
    return dispatch(mode, element, [&](auto m, auto e) {
        backward<decltype(m), decltype(e)>(*call, grad_output, query, key, value, output, logsumexp, grad_query,
                                           grad_key, grad_value, delta, memory);
    });
}
}
