// Vectors of `kWidth` lanes of 32 bits, as wide as the processor's.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vectors_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vectors_avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include "vectors_neon.h"
#else
#error "the native kernel needs AVX2, FMA and F16C, or AVX-512, or NEON"
#endif

namespace {

#if !HAS_HALVES  // half a vector takes as long as a whole one
using HalfVector = Vector;
using HalfLanes = Lanes;
inline HalfVector half_of(Vector values) { return values; }
inline HalfLanes half_of(Lanes lanes) { return lanes; }
inline HalfVector load_half(const float *from) { return load(from); }
inline HalfLanes load_half(const Lane *from) { return load(from); }
inline void store_half(float *to, HalfVector values) { store(to, values); }
#endif

// Lanes as whole numbers, with the operators of the language.
typedef std::uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t SignedWords __attribute__((vector_size(4 * kWidth)));

inline Words all_words(Lane word) { return (Words)all(word); }
inline Words counted_from(Lane start) {
    Words words;
    for (Index i = 0; i < kWidth; i++) words[i] = start + static_cast<Lane>(i);
    return words;
}

// 2^f for f in [-1/2, 1/2]. The polynomial is within 2e-8 of it, before rounding to float.
inline Vector exp2_of_fraction(Vector f) {
    Vector p = all(1.53458098e-4f);
    p = fmadd(p, f, all(1.33999312e-3f));
    p = fmadd(p, f, all(9.61848897e-3f));
    p = fmadd(p, f, all(5.55032878e-2f));
    p = fmadd(p, f, all(2.40226469e-1f));
    p = fmadd(p, f, all(6.93147206e-1f));
    p = fmadd(p, f, all(1.0f));
    return p;
}

}  // namespace
