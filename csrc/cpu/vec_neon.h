// Four lanes: AArch64 Advanced SIMD.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "../dtypes.h"
#include "../formulas/math.h"

namespace lit_fast::neon {

struct Wide {
    static constexpr int lanes = 2;
    float64x2_t value;
    LIT_FAST_INLINE Wide() : value(vdupq_n_f64(0.0)) {}
    LIT_FAST_INLINE explicit Wide(float64x2_t v) : value(v) {}
    LIT_FAST_INLINE void store(double* out) const { vst1q_f64(out, value); }
};
LIT_FAST_INLINE Wide fma(Wide a, Wide b, Wide c) { return Wide(vfmaq_f64(c.value, a.value, b.value)); }

struct Vec {
    static constexpr int lanes = 4;
    static constexpr bool numbers_only = false;
    float32x4_t value;
    LIT_FAST_INLINE Vec() : value(vdupq_n_f32(0.0F)) {}
    LIT_FAST_INLINE explicit Vec(float v) : value(vdupq_n_f32(v)) {}
    LIT_FAST_INLINE explicit Vec(float32x4_t v) : value(v) {}
    static Vec load(const float* p);
    static Vec load(const bf16* p);
    static Vec load_first(const float* p, int n);
    static Vec load_first(const bf16* p, int n);
    template <int part>
    Wide widen() const;
    static void prefetch(const void* p);
};
LIT_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(vaddq_f32(a.value, b.value)); }
LIT_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(vsubq_f32(a.value, b.value)); }
LIT_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(vmulq_f32(a.value, b.value)); }
LIT_FAST_INLINE Vec operator/(Vec a, Vec b) { return Vec(vdivq_f32(a.value, b.value)); }
LIT_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(vfmaq_f32(c.value, a.value, b.value)); }
LIT_FAST_INLINE Vec sqrt(Vec a) { return Vec(vsqrtq_f32(a.value)); }
// FMIN and FMAX return NaN when either operand is NaN.
LIT_FAST_INLINE Vec clamp(Vec a, Vec low, Vec high) {
    return Vec(vminq_f32(vmaxq_f32(a.value, low.value), high.value));
}
LIT_FAST_INLINE Vec max(Vec a, Vec b) { return Vec(vmaxq_f32(a.value, b.value)); }
LIT_FAST_INLINE Vec sign(Vec a) {
    const uint32x4_t sign_bit = vandq_u32(vreinterpretq_u32_f32(a.value), vdupq_n_u32(0x80000000U));
    const uint32x4_t one = vorrq_u32(sign_bit, vreinterpretq_u32_f32(vdupq_n_f32(1.0F)));
    const uint32x4_t nonzero = vorrq_u32(vcltq_f32(a.value, vdupq_n_f32(0.0F)), vcgtq_f32(a.value, vdupq_n_f32(0.0F)));
    return Vec(vbslq_f32(nonzero, vreinterpretq_f32_u32(one), a.value));
}
template <int part>
LIT_FAST_INLINE Wide Vec::widen() const {
    if constexpr (part == 0) {
        return Wide(vcvt_f64_f32(vget_low_f32(value)));
    } else {
        return Wide(vcvt_high_f64_f32(value));
    }
}

LIT_FAST_INLINE Vec Vec::load(const float* p) { return Vec(vld1q_f32(p)); }
LIT_FAST_INLINE void store(float* p, Vec a) { vst1q_f32(p, a.value); }

LIT_FAST_INLINE Vec from_bf16(uint16x4_t halves) { return Vec(vreinterpretq_f32_u32(vshll_n_u16(halves, 16))); }
// To nearest even; every NaN becomes 0x7fc0, as in torch.
LIT_FAST_INLINE uint16x4_t to_bf16(Vec a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    const uint32x4_t is_number = vceqq_f32(a.value, a.value);
    return vmovn_u32(vbslq_u32(is_number, rounded, vdupq_n_u32(0x7fc0)));
}
LIT_FAST_INLINE Vec Vec::load(const bf16* p) { return from_bf16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))); }
LIT_FAST_INLINE void store(bf16* p, Vec a) { vst1_u16(reinterpret_cast<std::uint16_t*>(p), to_bf16(a)); }

// The first n lanes, 0 < n < 4; nothing outside them is read or written, other lanes load as zero. Advanced SIMD has
// no masked loads: the lanes pass through a vector on the stack.
LIT_FAST_INLINE Vec Vec::load_first(const float* p, int n) {
    float lanes[4] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(float));
    return load(lanes);
}
LIT_FAST_INLINE void store_first(float* p, Vec a, int n) {
    float lanes[4];
    store(lanes, a);
    __builtin_memcpy(p, lanes, static_cast<unsigned>(n) * sizeof(float));
}
LIT_FAST_INLINE Vec Vec::load_first(const bf16* p, int n) {
    bf16 lanes[4] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(bf16));
    return load(lanes);
}
LIT_FAST_INLINE void store_first(bf16* p, Vec a, int n) {
    bf16 lanes[4];
    store(lanes, a);
    __builtin_memcpy(p, lanes, static_cast<unsigned>(n) * sizeof(bf16));
}

LIT_FAST_INLINE void Vec::prefetch(const void* p) { __builtin_prefetch(p); }

using BfloatVec = Vec;  // for a step of nothing but bf16
using Coded = void;     // for a step of bf16 with 8-bit moments: staged

}  // namespace lit_fast::neon
