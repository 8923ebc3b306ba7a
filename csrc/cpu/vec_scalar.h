// One lane: the reference that every other target must equal bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../dtypes.h"
#include "../formulas/math.h"

namespace lit_fast::scalar {

struct Wide {
    static constexpr int lanes = 1;
    double value;
    LIT_FAST_INLINE Wide() : value(0.0) {}
    LIT_FAST_INLINE explicit Wide(double v) : value(v) {}
    LIT_FAST_INLINE void store(double* out) const { *out = value; }
};
LIT_FAST_INLINE Wide fma(Wide a, Wide b, Wide c) { return Wide(__builtin_fma(a.value, b.value, c.value)); }

struct Vec {
    static constexpr int lanes = 1;
    static constexpr bool numbers_only = false;
    float value;
    LIT_FAST_INLINE Vec() : value(0.0F) {}
    LIT_FAST_INLINE explicit Vec(float v) : value(v) {}
    static Vec load(const float* p);
    static Vec load(const bf16* p);
    template <class T>
    static Vec load_first(const T* p, int n);
    template <int part>
    Wide widen() const;
    static void prefetch(const void* p);
};
LIT_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.value + b.value); }
LIT_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.value - b.value); }
LIT_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.value * b.value); }
LIT_FAST_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.value / b.value); }
LIT_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(__builtin_fmaf(a.value, b.value, c.value)); }
LIT_FAST_INLINE Vec sqrt(Vec a) { return Vec(__builtin_sqrtf(a.value)); }
LIT_FAST_INLINE Vec clamp(Vec a, Vec low, Vec high) {
    const float raised = a.value < low.value ? low.value : a.value;
    return Vec(raised > high.value ? high.value : raised);
}
LIT_FAST_INLINE Vec max(Vec a, Vec b) { return Vec(a.value != a.value || a.value > b.value ? a.value : b.value); }
LIT_FAST_INLINE Vec sign(Vec a) { return Vec(a.value > 0.0F ? 1.0F : a.value < 0.0F ? -1.0F : a.value); }
template <int part>
LIT_FAST_INLINE Wide Vec::widen() const {
    return Wide(static_cast<double>(value));
}

LIT_FAST_INLINE Vec Vec::load(const float* p) { return Vec(*p); }
LIT_FAST_INLINE void store(float* p, Vec a) { *p = a.value; }
LIT_FAST_INLINE Vec Vec::load(const bf16* p) {
    const std::uint32_t bits = static_cast<std::uint32_t>(p->bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return Vec(value);
}
// To nearest even; every NaN becomes 0x7fc0, as in torch.
LIT_FAST_INLINE void store(bf16* p, Vec a) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &a.value, 4);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    p->bits = static_cast<std::uint16_t>(a.value != a.value ? 0x7fc0U : rounded);
}
// A partial vector of one lane would be empty: these exist for the loop's template and are never reached.
template <class T>
LIT_FAST_INLINE Vec Vec::load_first(const T*, int) {
    return Vec();
}
template <class T>
LIT_FAST_INLINE void store_first(T*, Vec, int) {}

LIT_FAST_INLINE void Vec::prefetch(const void*) {}

using BfloatVec = Vec;  // for a step of nothing but bf16
using Coded = void;     // for a step of bf16 with 8-bit moments: staged

}  // namespace lit_fast::scalar
