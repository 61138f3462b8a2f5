// Vectors of 16 lanes by AVX-512. The names are those of vectors_avx2.h, and more for products of bfloat16.

#pragma once

#include <immintrin.h>

#include "sizes.h"

#define HAS_HALVES 1
#if defined(__AVX512BF16__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

namespace {

using Vector = __m512;  // of floats
using Lanes = __m512i;  // of 32 bits

constexpr Index kWidth = 16;
constexpr Index kRegisters = 32;

// A mask of the first `count` of 16 lanes; of all lanes if there are more.
inline __mmask16 first(Index count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<Index>(count, 0)) - 1);
}

inline Vector zeros() { return _mm512_setzero_ps(); }
inline Vector all(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float *from) { return _mm512_loadu_ps(from); }
inline Vector load_first(const float *from, Index count) { return _mm512_maskz_loadu_ps(first(count), from); }
inline Vector load_first(const float *from, Index count, Vector others) {
    return _mm512_mask_loadu_ps(others, first(count), from);
}
inline void store(float *to, Vector values) { _mm512_storeu_ps(to, values); }
inline void store_first(float *to, Index count, Vector values) { _mm512_mask_storeu_ps(to, first(count), values); }
inline Vector fmadd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector fmsub(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }  // b if a is NaN
inline float sum_of(Vector values) { return _mm512_reduce_add_ps(values); }
inline float largest_of(Vector values) { return _mm512_reduce_max_ps(values); }

inline Lanes as_lanes(Vector values) { return _mm512_castps_si512(values); }
inline Vector as_floats(Lanes lanes) { return _mm512_castsi512_ps(lanes); }
inline Lanes no_lanes() { return _mm512_setzero_si512(); }
inline Lanes all(Lane lane) { return _mm512_set1_epi32(static_cast<int>(lane)); }
inline Lanes load(const Lane *from) { return _mm512_loadu_si512(from); }
inline void keep_in_register(Lanes &) {}  // with 32 registers, compilers do this by themselves
inline void store(Lane *to, Lanes lanes) { _mm512_storeu_si512(to, lanes); }
inline void store_first(Lane *to, Index count, Lanes lanes) { _mm512_mask_storeu_epi32(to, first(count), lanes); }

// ---- half a vector: the first 8 lanes. It takes half the time of a whole one.

using HalfVector = __m256;
using HalfLanes = __m256i;

inline HalfVector half_of(Vector values) { return _mm512_castps512_ps256(values); }
inline HalfLanes half_of(Lanes lanes) { return _mm512_castsi512_si256(lanes); }
inline HalfVector as_floats(HalfLanes lanes) { return _mm256_castsi256_ps(lanes); }
inline HalfVector load_half(const float *from) { return _mm256_loadu_ps(from); }
inline HalfLanes load_half(const Lane *from) { return _mm256_loadu_si256(reinterpret_cast<const HalfLanes *>(from)); }
inline void store_half(float *to, HalfVector values) { _mm256_storeu_ps(to, values); }
inline HalfVector fmadd(HalfVector a, HalfVector b, HalfVector c) { return _mm256_fmadd_ps(a, b, c); }

// ---- half precision: the first `count` elements, at most 16, with zeros beyond

inline Vector load_float16(const std::uint16_t *from, Index count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from));
}
inline void store_float16(std::uint16_t *to, Index count, Vector values) {
    _mm256_mask_storeu_epi16(to, first(count), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline __m256i to_bfloat(Vector values) {
#if HAS_BF16
    return (__m256i)_mm512_cvtneps_pbh(values);
#else
    const Lanes bits = as_lanes(values);
    const Lanes odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Lanes rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const Lanes quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
inline Vector load_bfloat16(const std::uint16_t *from, Index count) {
    return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from)), 16));
}
inline void store_bfloat16(std::uint16_t *to, Index count, Vector values) {
    _mm256_mask_storeu_epi16(to, first(count), to_bfloat(values));
}

// ---- bool: 0 for true; minus infinity for false, and beyond the first `count` elements

inline Vector load_bool(const std::uint8_t *from, Index count) {
    const __m128i some = _mm_maskz_loadu_epi8(first(count), from);
    return as_floats(_mm512_maskz_set1_epi32(_mm_testn_epi8_mask(some, some), static_cast<int>(0xff800000)));
}

// ---- 2^x

inline Vector exp2_of_fraction(Vector f);  // in vectors.h

// 2^x for weights that are rounded to bfloat16: a cubic polynomial of the fraction in [0, 1), within 8e-5.
inline Vector exp2_coarse(Vector x) {
    const Vector f = _mm512_reduce_ps(x, 1);  // x - floor(x)
    Vector p = all(0.07802449f);
    p = fmadd(p, f, all(0.2260672f));
    p = fmadd(p, f, all(0.69583353f));
    p = fmadd(p, f, all(0.99992522f));
    return _mm512_scalef_ps(p, x);  // takes the floor itself
}

// 2^x, as exact as `exp2_of_fraction`.
inline Vector exp2_fine(Vector x) {
    const Vector f = _mm512_reduce_ps(x, 0);  // x - round(x)
    return _mm512_scalef_ps(exp2_of_fraction(f), x - f);
}

// ---- lanes

// Transposes 16 by 16 lanes in registers.
inline void transpose(Lanes (&rows)[16]) {
    Lanes t[16];
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
        const Lanes a = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x44);
        const Lanes b = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xee);
        const Lanes d = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x44);
        const Lanes e = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xee);
        t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
    }
    for (int i = 0; i < 16; i++) rows[i] = t[i];
}

#if HAS_BF16
// Pairs of bfloat16 in lanes: first all of `low`, then all of `high`; and one of `low`, one of `high` in turn.
inline Lanes bfloat_pairs(Vector low, Vector high) { return (Lanes)_mm512_cvtne2ps_pbh(high, low); }
inline Lanes interleaved_pairs(Vector low, Vector high) {
    const Lanes turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(turns, bfloat_pairs(low, high));
}
#endif

}  // namespace
