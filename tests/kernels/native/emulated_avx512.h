// AVX-512, its bfloat16 and AMX, emulated one lane after another: as much as the native kernel takes of them, so that
// its code for processors with these runs on any with AVX2. Included before the source by the compiler's option -include.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

using Floats = __m512;
using Ints = __m512i;
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(64)));
typedef std::uint16_t Sixteen __attribute__((vector_size(32)));

template <class To, class From>
To bits(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class Function>
Floats floats(const Function &of) {
    Floats result;
    for (int i = 0; i < 16; i++) result[i] = of(i);
    return result;
}
template <class Function>
Ints words(const Function &of) {
    Words result;
    for (int i = 0; i < 16; i++) result[i] = of(i);
    return (Ints)result;
}
template <class Function>
Ints halves(const Function &of) {
    Halves result;
    for (int i = 0; i < 32; i++) result[i] = of(i);
    return (Ints)result;
}

inline std::uint32_t word(const Ints &of, int i) { return ((Words)of)[i]; }
inline std::uint16_t half(const Ints &of, int i) { return ((Halves)of)[i]; }

inline std::uint16_t to_bfloat(float value) {
    const auto from = bits<std::uint32_t>(value);
    if (std::isnan(value)) return static_cast<std::uint16_t>((from | 0x400000) >> 16);
    return static_cast<std::uint16_t>((from + 0x7fff + (from >> 16 & 1)) >> 16);
}
inline float from_bfloat(std::uint16_t value) { return bits<float>(static_cast<std::uint32_t>(value) << 16); }

// ---- floats

inline Floats zero_floats() { return floats([](int) { return 0.0f; }); }
inline Floats all_floats(float value) { return floats([=](int) { return value; }); }
inline Floats load(const void *from) { Floats to; std::memcpy(&to, from, 64); return to; }
inline void store(void *to, const Floats &from) { std::memcpy(to, &from, 64); }
inline Floats mask_load(const Floats &others, __mmask16 some, const float *from) {
    return floats([&](int i) { return some >> i & 1 ? from[i] : others[i]; });
}
inline Floats maskz_load(__mmask16 some, const float *from) { return mask_load(zero_floats(), some, from); }
inline void mask_store(float *to, __mmask16 some, const Floats &from) {
    for (int i = 0; i < 16; i++) if (some >> i & 1) to[i] = from[i];
}
inline Floats fmadd(const Floats &a, const Floats &b, const Floats &c) {
    return floats([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline Floats fmsub(const Floats &a, const Floats &b, const Floats &c) {
    return floats([&](int i) { return std::fma(a[i], b[i], -c[i]); });
}
inline Floats max(const Floats &a, const Floats &b) {
    return floats([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline float reduce_add(const Floats &of) {
    float parts[16];
    store(parts, of);
    for (int width = 8; width; width /= 2) for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    return parts[0];
}
inline float reduce_max(const Floats &of) {
    float parts[16];
    store(parts, of);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) parts[i] = parts[i] > parts[i + width] ? parts[i] : parts[i + width];
    return parts[0];
}
// The fraction beside the whole number: 0 rounds to the nearest, 1 down. Of an infinity, zero.
inline Floats reduce(const Floats &x, int how) {
    return floats([&](int i) {
        return std::isinf(x[i]) ? 0.0f : x[i] - (how ? std::floor(x[i]) : std::nearbyint(x[i]));
    });
}
inline Floats scalef(const Floats &a, const Floats &b) {
    return floats([&](int i) {
        if (std::isnan(b[i])) return b[i];
        if (std::isinf(b[i])) return b[i] > 0 ? a[i] * b[i] : a[i] * 0.0f;
        return std::ldexp(a[i], static_cast<int>(std::fmax(-1000.0f, std::fmin(1000.0f, std::floor(b[i])))));
    });
}
inline __mmask16 compare(const Floats &a, const Floats &b, int) {  // _CMP_UNORD_Q alone
    __mmask16 some = 0;
    for (int i = 0; i < 16; i++) some |= static_cast<__mmask16>((std::isnan(a[i]) || std::isnan(b[i])) << i);
    return some;
}

// ---- integers

inline Ints as_ints(const Floats &of) { return bits<Ints>(of); }
inline Floats as_floats(const Ints &of) { return bits<Floats>(of); }
inline __m256i lower(const Ints &of) { __m256i to; std::memcpy(&to, &of, 32); return to; }
inline __m256 lower(const Floats &of) { __m256 to; std::memcpy(&to, &of, 32); return to; }
inline Ints zero_ints() { return words([](int) { return 0u; }); }
inline Ints all_ints(int value) { return words([=](int) { return static_cast<std::uint32_t>(value); }); }
inline Ints load_ints(const void *from) { return as_ints(load(from)); }
inline void store_ints(void *to, const Ints &from) { std::memcpy(to, &from, 64); }
inline void mask_store_words(void *to, __mmask16 some, const Ints &from) {
    for (int i = 0; i < 16; i++) if (some >> i & 1) static_cast<std::uint32_t *>(to)[i] = word(from, i);
}
inline Ints maskz_load_halves(__mmask32 some, const void *from) {
    return halves([&](int i) {
        return some >> i & 1 ? static_cast<const std::uint16_t *>(from)[i] : static_cast<std::uint16_t>(0);
    });
}
inline __m256i maskz_load_16(__mmask16 some, const void *from) { return lower(maskz_load_halves(some, from)); }
inline void mask_store_16(void *to, __mmask16 some, const __m256i &from) {
    const auto values = bits<Sixteen>(from);
    for (int i = 0; i < 16; i++) if (some >> i & 1) static_cast<std::uint16_t *>(to)[i] = values[i];
}
inline Ints mask_move(const Ints &others, __mmask16 some, const Ints &from) {
    return words([&](int i) { return word(some >> i & 1 ? from : others, i); });
}
inline __m128i maskz_load_bytes(__mmask16 some, const void *from) {
    std::uint8_t to[16];
    for (int i = 0; i < 16; i++) to[i] = some >> i & 1 ? static_cast<const std::uint8_t *>(from)[i] : 0;
    return bits<__m128i>(to);
}
inline __mmask16 no_bits_of_bytes(const __m128i &a, const __m128i &b) {
    std::uint8_t both[16];
    std::memcpy(both, &a, 16);
    __mmask16 some = 0;
    for (int i = 0; i < 16; i++)
        some |= static_cast<__mmask16>((both[i] & reinterpret_cast<const std::uint8_t *>(&b)[i]) == 0) << i;
    return some;
}
inline Ints maskz_all_words(__mmask16 some, int value) {
    return words([&](int i) { return some >> i & 1 ? static_cast<std::uint32_t>(value) : 0u; });
}
inline Ints add_words(const Ints &a, const Ints &b) { return words([&](int i) { return word(a, i) + word(b, i); }); }
inline Ints shift_left(const Ints &of, int by) { return words([&](int i) { return word(of, i) << by; }); }
inline Ints shift_right(const Ints &of, int by) { return words([&](int i) { return word(of, i) >> by; }); }
inline Ints widen(const __m256i &of) {
    return words([&](int i) { return static_cast<std::uint32_t>(bits<Sixteen>(of)[i]); });
}
inline __m256i narrow(const Ints &of) {
    Sixteen to;
    for (int i = 0; i < 16; i++) to[i] = static_cast<std::uint16_t>(word(of, i));
    return bits<__m256i>(to);
}
// Within each 128-bit part: elements of `size` words, of a and b in turns, from the part's first or second half.
inline Ints unpack(const Ints &a, const Ints &b, int size, bool high) {
    return words([&](int i) {
        const int part = i / 4 * 4, element = i % 4 / size, in = i % size;
        return word(element % 2 ? b : a, part + (high ? 2 : 0) + element / 2 * size + in);
    });
}
inline Ints shuffle_parts(const Ints &a, const Ints &b, int how) {
    return words([&](int i) { return word(i < 8 ? a : b, (how >> (i / 4 * 2) & 3) * 4 + i % 4); });
}
inline Ints permute_halves(const Ints &index, const Ints &of) {
    return halves([&](int i) { return half(of, half(index, i) & 31); });
}
template <class... Values>
Ints set_halves(Values... values) {
    const int given[] = {values...};
    return halves([&](int i) { return static_cast<std::uint16_t>(given[31 - i]); });
}

// ---- half precision

inline Floats from_float16(const __m256i &of) {
    return floats([&](int i) { return _cvtsh_ss(bits<Sixteen>(of)[i]); });
}
inline __m256i to_float16(const Floats &of, int) {
    Sixteen to;
    for (int i = 0; i < 16; i++) to[i] = _cvtss_sh(of[i], 0);
    return bits<__m256i>(to);
}
inline __m256i to_bfloats(const Floats &of) {
    Sixteen to;
    for (int i = 0; i < 16; i++) to[i] = to_bfloat(of[i]);
    return bits<__m256i>(to);
}
inline Ints to_two_bfloats(const Floats &high, const Floats &low) {
    return halves([&](int i) { return to_bfloat(i < 16 ? low[i] : high[i - 16]); });
}
inline Floats dot(const Floats &sum, const Ints &a, const Ints &b) {
    return floats([&](int i) {
        const float odd = std::fma(from_bfloat(half(a, 2 * i + 1)), from_bfloat(half(b, 2 * i + 1)), sum[i]);
        return std::fma(from_bfloat(half(a, 2 * i)), from_bfloat(half(b, 2 * i)), odd);
    });
}
inline __m256 half_dot(const __m256 &sum, const __m256i &a, const __m256i &b) {
    const auto whole = [](const auto &half) { Ints to{}; std::memcpy(&to, &half, 32); return to; };
    return lower(dot(as_floats(whole(sum)), whole(a), whole(b)));
}

// ---- tiles of 16 rows of 64 bytes

inline thread_local std::uint32_t tiles[8][16][16];

inline void tile_load(int tile, const void *from, std::int64_t stride) {
    for (int i = 0; i < 16; i++) std::memcpy(tiles[tile][i], static_cast<const char *>(from) + i * stride, 64);
}
inline void tile_store(int tile, void *to, std::int64_t stride) {
    for (int i = 0; i < 16; i++) std::memcpy(static_cast<char *>(to) + i * stride, tiles[tile][i], 64);
}
inline void tile_zero(int tile) { std::memset(tiles[tile], 0, sizeof(tiles[tile])); }
inline void tile_dot(int c, int a, int b) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum = bits<float>(tiles[c][i][j]);
            for (int k = 0; k < 16; k++)
                for (int of = 0; of < 32; of += 16)
                    sum = std::fma(from_bfloat(static_cast<std::uint16_t>(tiles[a][i][k] >> of)),
                                   from_bfloat(static_cast<std::uint16_t>(tiles[b][k][j] >> of)), sum);
            tiles[c][i][j] = bits<std::uint32_t>(sum);
        }
}

}  // namespace emulated

// Compilers have some of them as macros.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_reduce_ps
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _tile_dpbf16ps
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#define _mm_maskz_loadu_epi8 emulated::maskz_load_bytes
#define _mm_testn_epi8_mask emulated::no_bits_of_bytes
#define _mm512_maskz_set1_epi32 emulated::maskz_all_words
#define _mm256_mask_storeu_epi16 emulated::mask_store_16
#define _mm256_maskz_loadu_epi16 emulated::maskz_load_16
#define _mm256_dpbf16_ps emulated::half_dot
#define _mm512_add_epi32 emulated::add_words
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_castps_si512 emulated::as_ints
#define _mm512_castps512_ps256 emulated::lower
#define _mm512_castsi512_ps emulated::as_floats
#define _mm512_castsi512_si256 emulated::lower
#define _mm512_cmp_ps_mask emulated::compare
#define _mm512_cvtepi32_epi16 emulated::narrow
#define _mm512_cvtepu16_epi32 emulated::widen
#define _mm512_cvtne2ps_pbh emulated::to_two_bfloats
#define _mm512_cvtneps_pbh emulated::to_bfloats
#define _mm512_cvtph_ps emulated::from_float16
#define _mm512_cvtps_ph emulated::to_float16
#define _mm512_dpbf16_ps emulated::dot
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_fmsub_ps emulated::fmsub
#define _mm512_load_si512 emulated::load_ints
#define _mm512_loadu_ps emulated::load
#define _mm512_loadu_si512 emulated::load_ints
#define _mm512_mask_loadu_ps emulated::mask_load
#define _mm512_mask_mov_epi32 emulated::mask_move
#define _mm512_mask_storeu_epi32 emulated::mask_store_words
#define _mm512_mask_storeu_ps emulated::mask_store
#define _mm512_maskz_loadu_epi16 emulated::maskz_load_halves
#define _mm512_maskz_loadu_ps emulated::maskz_load
#define _mm512_max_ps emulated::max
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_permutexvar_epi16 emulated::permute_halves
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_reduce_ps emulated::reduce
#define _mm512_scalef_ps emulated::scalef
#define _mm512_set1_epi32 emulated::all_ints
#define _mm512_set1_ps emulated::all_floats
#define _mm512_set_epi16 emulated::set_halves
#define _mm512_setzero_ps emulated::zero_floats
#define _mm512_setzero_si512 emulated::zero_ints
#define _mm512_shuffle_i32x4 emulated::shuffle_parts
#define _mm512_slli_epi32 emulated::shift_left
#define _mm512_srli_epi32 emulated::shift_right
#define _mm512_storeu_ps emulated::store
#define _mm512_storeu_si512 emulated::store_ints
#define _mm512_unpackhi_epi32(a, b) emulated::unpack(a, b, 1, true)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack(a, b, 2, true)
#define _mm512_unpacklo_epi32(a, b) emulated::unpack(a, b, 1, false)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack(a, b, 2, false)
#define __m256bh __m256i
#define __m512bh __m512i

#define _tile_dpbf16ps emulated::tile_dot
#define _tile_loadconfig(shapes) static_cast<void>(shapes)
#define _tile_loadd emulated::tile_load
#define _tile_release() static_cast<void>(0)
#define _tile_stored emulated::tile_store
#define _tile_zero emulated::tile_zero

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512BF16__ 1
#define __AMX_BF16__ 1
