// Sixteen lanes: AVX-512 F, BW and VL. Conversions to bf16 are done with integers because VCVTNEPS2BF16 flushes
// denormals.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../dtypes.h"
#include "../formulas/math.h"

namespace lit_fast::avx512 {

struct Wide {
    static constexpr int lanes = 8;
    __m512d value;
    LIT_FAST_INLINE Wide() : value(_mm512_setzero_pd()) {}
    LIT_FAST_INLINE explicit Wide(__m512d v) : value(v) {}
    LIT_FAST_INLINE void store(double* out) const { _mm512_storeu_pd(out, value); }
};
LIT_FAST_INLINE Wide fma(Wide a, Wide b, Wide c) { return Wide(_mm512_fmadd_pd(a.value, b.value, c.value)); }

struct Vec {
    static constexpr int lanes = 16;
    static constexpr bool numbers_only = false;
    __m512 value;
    LIT_FAST_INLINE Vec() : value(_mm512_setzero_ps()) {}
    LIT_FAST_INLINE explicit Vec(float v) : value(_mm512_set1_ps(v)) {}
    LIT_FAST_INLINE explicit Vec(__m512 v) : value(v) {}
    static Vec load(const float* p);
    static Vec load(const bf16* p);
    static Vec load_first(const float* p, int n);
    static Vec load_first(const bf16* p, int n);
    template <int part>
    Wide widen() const;
    static void prefetch(const void* p);
};
LIT_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm512_div_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.value, b.value, c.value)); }
LIT_FAST_INLINE Vec sqrt(Vec a) { return Vec(_mm512_sqrt_ps(a.value)); }
// minps and maxps return their second operand when either is NaN.
LIT_FAST_INLINE Vec clamp(Vec a, Vec low, Vec high) {
    return Vec(_mm512_min_ps(high.value, _mm512_max_ps(low.value, a.value)));
}
LIT_FAST_INLINE Vec max(Vec a, Vec b) {
    const __mmask16 a_is_nan = _mm512_cmp_ps_mask(a.value, a.value, _CMP_UNORD_Q);
    return Vec(_mm512_mask_mov_ps(_mm512_max_ps(a.value, b.value), a_is_nan, a.value));
}
LIT_FAST_INLINE Vec sign(Vec a) {
    const __m512i sign_bit = _mm512_and_si512(_mm512_castps_si512(a.value), _mm512_set1_epi32(INT32_MIN));
    const __m512 one = _mm512_castsi512_ps(_mm512_or_si512(sign_bit, _mm512_castps_si512(_mm512_set1_ps(1.0F))));
    return Vec(_mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(a.value, _mm512_setzero_ps(), _CMP_EQ_UQ), a.value));
}
template <int part>
LIT_FAST_INLINE Wide Vec::widen() const {
    const __m512d as_double = _mm512_castps_pd(value);
    return Wide(_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(as_double, part))));
}

LIT_FAST_INLINE Vec Vec::load(const float* p) { return Vec(_mm512_loadu_ps(p)); }
LIT_FAST_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.value); }

LIT_FAST_INLINE Vec from_bf16(__m256i halves) {
    return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}
// To nearest even; every NaN becomes 0x7fc0, as in torch.
LIT_FAST_INLINE __m256i to_bf16(Vec a) {
    const __m512i bits = _mm512_castps_si512(a.value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.value, a.value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}
LIT_FAST_INLINE Vec Vec::load(const bf16* p) {
    return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LIT_FAST_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }

// The first n lanes, 0 < n < 16; nothing outside them is read or written, other lanes load as zero.
LIT_FAST_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1U << n) - 1U); }
LIT_FAST_INLINE Vec Vec::load_first(const float* p, int n) { return Vec(_mm512_maskz_loadu_ps(first_lanes(n), p)); }
LIT_FAST_INLINE void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.value); }
LIT_FAST_INLINE Vec Vec::load_first(const bf16* p, int n) {
    return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
LIT_FAST_INLINE void store_first(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a)); }

LIT_FAST_INLINE void Vec::prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

using BfloatVec = Vec;  // for a step of nothing but bf16
using Coded = void;     // for a step of bf16 with 8-bit moments: staged

}  // namespace lit_fast::avx512
