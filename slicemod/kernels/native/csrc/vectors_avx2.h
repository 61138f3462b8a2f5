// Vectors of 8 lanes by AVX2, FMA and F16C. The names are those of vectors_avx512.h, without products of bfloat16.

#pragma once

#include <immintrin.h>

#include <cstring>

#include "sizes.h"

#define HAS_BF16 0
#define HAS_HALVES 0

namespace {

using Vector = __m256;  // of floats
using Lanes = __m256i;  // of 32 bits

constexpr Index kWidth = 8;
constexpr Index kRegisters = 16;

// A mask of the first `count` of 8 lanes.
inline __m256i first(Index count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vector zeros() { return _mm256_setzero_ps(); }
inline Vector all(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float *from) { return _mm256_loadu_ps(from); }
inline Vector load_first(const float *from, Index count) {
    return count >= 8 ? load(from) : _mm256_maskload_ps(from, first(count));
}
inline Vector load_first(const float *from, Index count, Vector others) {
    return count >= 8 ? load(from)
                      : _mm256_blendv_ps(others, load_first(from, count), _mm256_castsi256_ps(first(count)));
}
inline void store(float *to, Vector values) { _mm256_storeu_ps(to, values); }
// A masked store takes as long as a dozen plain ones, so it is used only if it is needed.
inline void store_first(float *to, Index count, Vector values) {
    count >= 8 ? store(to, values) : _mm256_maskstore_ps(to, first(count), values);
}
inline Vector fmadd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector fmsub(Vector a, Vector b, Vector c) { return _mm256_fmsub_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }  // b if a is NaN
inline float sum_of(Vector values) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float largest_of(Vector values) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

inline Lanes as_lanes(Vector values) { return _mm256_castps_si256(values); }
inline Vector as_floats(Lanes lanes) { return _mm256_castsi256_ps(lanes); }
inline Lanes no_lanes() { return _mm256_setzero_si256(); }
inline Lanes all(Lane lane) { return _mm256_set1_epi32(static_cast<int>(lane)); }
inline Lanes load(const Lane *from) { return _mm256_loadu_si256(reinterpret_cast<const Lanes *>(from)); }
// Keeps the value in a register. Otherwise every multiplication would load it again, and loads limit the speed.
inline void keep_in_register(Lanes &lanes) { asm("" : "+x"(lanes)); }
inline void store(Lane *to, Lanes lanes) { _mm256_storeu_si256(reinterpret_cast<Lanes *>(to), lanes); }
inline void store_first(Lane *to, Index count, Lanes lanes) {
    store_first(reinterpret_cast<float *>(to), count, as_floats(lanes));
}

// ---- half precision: the first `count` elements, at most 8, with zeros beyond

inline __m128i load_halves(const std::uint16_t *from, Index count) {
    if (count >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    alignas(16) std::uint16_t some[8] = {};
    for (Index i = 0; i < count; i++) some[i] = from[i];
    return _mm_load_si128(reinterpret_cast<const __m128i *>(some));
}
inline void store_halves(std::uint16_t *to, Index count, __m128i values) {
    if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i *>(to), values);
    alignas(16) std::uint16_t some[8];
    _mm_store_si128(reinterpret_cast<__m128i *>(some), values);
    for (Index i = 0; i < count; i++) to[i] = some[i];
}

inline Vector load_float16(const std::uint16_t *from, Index count) {
    return _mm256_cvtph_ps(load_halves(from, count));
}
inline void store_float16(std::uint16_t *to, Index count, Vector values) {
    store_halves(to, count, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

inline Vector load_bfloat16(const std::uint16_t *from, Index count) {
    return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(from, count)), 16));
}
inline void store_bfloat16(std::uint16_t *to, Index count, Vector values) {
    const Lanes bits = as_lanes(values);
    const Lanes odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Lanes rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const Vector nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    const Lanes quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const Lanes high = _mm256_srli_epi32(as_lanes(_mm256_blendv_ps(as_floats(rounded), as_floats(quiet), nan)), 16);
    const __m128i low_half = _mm256_castsi256_si128(high), high_half = _mm256_extracti128_si256(high, 1);
    store_halves(to, count, _mm_packus_epi32(low_half, high_half));
}

// ---- bool: 0 for true; minus infinity for false, and beyond the first `count` elements

inline Vector load_bool(const std::uint8_t *from, Index count) {
    std::uint64_t some = 0;
    count >= 8 ? std::memcpy(&some, from, 8) : std::memcpy(&some, from, std::max<Index>(count, 0));
    const Lanes seen = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(some)));
    return as_floats(_mm256_and_si256(_mm256_cmpeq_epi32(seen, no_lanes()), all(Lane{0xff800000})));
}

// ---- 2^x

inline Vector exp2_of_fraction(Vector f);  // in vectors.h

// 2^x for x below 128, as exact as `exp2_of_fraction`. It is 0 for x below -126.5, where the AVX-512 version goes on to
// denormal numbers. x plus `shifter` is rounded to a whole number, whose last bits are the exponent with its bias.
inline Vector exp2_fine(Vector x) {
    const Vector shifter = all(12582912.0f + 127);  // 1.5 * 2^23, and the bias of an exponent
    x = larger(all(-127.0f), x);                    // x if x is NaN
    const Vector shifted = x + shifter;
    const Vector f = x - (shifted - shifter);
    return exp2_of_fraction(f) * as_floats(_mm256_slli_epi32(as_lanes(shifted), 23));
}

// ---- lanes

// Transposes 8 by 8 lanes in registers.
inline void transpose(Lanes (&rows)[8]) {
    Lanes t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    // rows[4 g + c] holds, in its 128-bit part p, column 4 p + c of rows 4 g .. 4 g + 3.
    for (int c = 0; c < 4; c++) {
        t[c] = _mm256_permute2x128_si256(rows[c], rows[4 + c], 0x20);
        t[4 + c] = _mm256_permute2x128_si256(rows[c], rows[4 + c], 0x31);
    }
    for (int i = 0; i < 8; i++) rows[i] = t[i];
}

}  // namespace
