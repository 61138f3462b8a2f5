// Vectors of 4 lanes by Arm's NEON, which every 64-bit Arm processor has. The names are those of vectors_avx2.h.

#pragma once

#include <arm_neon.h>

#include <cstring>

#include "sizes.h"

#define HAS_BF16 0
#define HAS_HALVES 0

namespace {

using Vector = float32x4_t;
using Lanes = uint32x4_t;

constexpr Index kWidth = 4;
constexpr Index kRegisters = 32;

inline Vector zeros() { return vdupq_n_f32(0); }
inline Vector all(float value) { return vdupq_n_f32(value); }
inline Vector load(const float *from) { return vld1q_f32(from); }
inline Vector load_first(const float *from, Index count, Vector others) {
    if (count >= 4) return load(from);
    for (Index i = 0; i < count; i++) others[i] = from[i];
    return others;
}
inline Vector load_first(const float *from, Index count) { return load_first(from, count, zeros()); }
inline void store(float *to, Vector values) { vst1q_f32(to, values); }
inline void store_first(float *to, Index count, Vector values) {
    if (count >= 4) return store(to, values);
    for (Index i = 0; i < count; i++) to[i] = values[i];
}
inline Vector fmadd(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector fmsub(Vector a, Vector b, Vector c) { return vfmaq_f32(-c, a, b); }
inline Vector larger(Vector a, Vector b) { return vmaxnmq_f32(a, b); }  // b if a is NaN
inline float sum_of(Vector values) { return vaddvq_f32(values); }
inline float largest_of(Vector values) { return vmaxnmvq_f32(values); }

inline Lanes as_lanes(Vector values) { return vreinterpretq_u32_f32(values); }
inline Vector as_floats(Lanes lanes) { return vreinterpretq_f32_u32(lanes); }
inline Lanes no_lanes() { return vdupq_n_u32(0); }
inline Lanes all(Lane lane) { return vdupq_n_u32(lane); }
inline Lanes load(const Lane *from) { return vld1q_u32(from); }
inline void keep_in_register(Lanes &) {}  // with 32 registers, compilers do this by themselves
inline void store(Lane *to, Lanes lanes) { vst1q_u32(to, lanes); }
inline void store_first(Lane *to, Index count, Lanes lanes) {
    store_first(reinterpret_cast<float *>(to), count, as_floats(lanes));
}

// ---- half precision: the first `count` elements, at most 4, with zeros beyond

inline uint16x4_t load_halves(const std::uint16_t *from, Index count) {
    if (count >= 4) return vld1_u16(from);
    uint16x4_t some = vdup_n_u16(0);
    for (Index i = 0; i < count; i++) some[i] = from[i];
    return some;
}
inline void store_halves(std::uint16_t *to, Index count, uint16x4_t values) {
    if (count >= 4) return vst1_u16(to, values);
    for (Index i = 0; i < count; i++) to[i] = values[i];
}

inline Vector load_float16(const std::uint16_t *from, Index count) {
    return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(from, count)));
}
inline void store_float16(std::uint16_t *to, Index count, Vector values) {
    store_halves(to, count, vreinterpret_u16_f16(vcvt_f16_f32(values)));
}

inline Vector load_bfloat16(const std::uint16_t *from, Index count) {
    return as_floats(vshll_n_u16(load_halves(from, count), 16));
}
inline void store_bfloat16(std::uint16_t *to, Index count, Vector values) {
    const Lanes bits = as_lanes(values), rounded = bits + ((bits >> 16) & 1) + 0x7fff, quiet = bits | 0x400000;
    const Lanes number = vceqq_f32(values, values);  // not so for NaN
    store_halves(to, count, vshrn_n_u32(vbslq_u32(number, rounded, quiet), 16));
}

// ---- bool: 0 for true; minus infinity for false, and beyond the first `count` elements

inline Vector load_bool(const std::uint8_t *from, Index count) {
    std::uint32_t some = 0;
    count >= 4 ? std::memcpy(&some, from, 4) : std::memcpy(&some, from, std::max<Index>(count, 0));
    const Lanes seen = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(some))));
    return as_floats(vandq_u32(vceqq_u32(seen, no_lanes()), all(Lane{0xff800000})));
}

// ---- 2^x

inline Vector exp2_of_fraction(Vector f);  // in vectors.h

// 2^x for x below 128, as in vectors_avx2.h.
inline Vector exp2_fine(Vector x) {
    const Vector shifter = all(12582912.0f + 127);  // 1.5 * 2^23, and the bias of an exponent
    x = vmaxq_f32(all(-127.0f), x);                 // NaN if x is NaN
    const Vector shifted = x + shifter;
    const Vector f = x - (shifted - shifter);
    return exp2_of_fraction(f) * as_floats(as_lanes(shifted) << 23);
}

// ---- lanes

// Transposes 4 by 4 lanes in registers.
inline void transpose(Lanes (&rows)[4]) {
    const uint32x4x2_t upper = vzipq_u32(rows[0], rows[2]), lower = vzipq_u32(rows[1], rows[3]);
    const uint32x4x2_t left = vzipq_u32(upper.val[0], lower.val[0]), right = vzipq_u32(upper.val[1], lower.val[1]);
    rows[0] = left.val[0], rows[1] = left.val[1], rows[2] = right.val[0], rows[3] = right.val[1];
}

}  // namespace
