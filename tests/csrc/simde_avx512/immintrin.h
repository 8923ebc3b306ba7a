// Stands in for the compiler's <immintrin.h> where csrc/cpu/vec_avx512.h is built on SIMDe, which emulates AVX-512 on
// any machine. Names that SIMDe 0.7 lacks follow, from Intel's intrinsics guide.
#pragma once

#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

#define __m128i simde__m128i
#define __m256 simde__m256
#define __m256i simde__m256i
#define __m512 simde__m512
#define __m512d simde__m512d
#define __m512i simde__m512i
#define __mmask16 std::uint16_t

#define _CMP_EQ_UQ SIMDE_CMP_EQ_UQ
#define _CMP_UNORD_Q SIMDE_CMP_UNORD_Q
#define _MM_HINT_T0 3
#define _mm_prefetch(p, hint) __builtin_prefetch(p)
#define _mm_loadu_si128 simde_mm_loadu_si128
#define _mm_storeu_si128 simde_mm_storeu_si128
#define _mm256_castpd_ps simde_mm256_castpd_ps
#define _mm256_loadu_si256 simde_mm256_loadu_si256
#define _mm256_storeu_si256 simde_mm256_storeu_si256
#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_add_ps simde_mm512_add_ps
#define _mm512_and_si512 simde_mm512_and_si512
#define _mm512_castpd_ps simde_mm512_castpd_ps
#define _mm512_castps_pd simde_mm512_castps_pd
#define _mm512_castps_si512 simde_mm512_castps_si512
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#define _mm512_cmp_ps_mask simde_mm512_cmp_ps_mask
#define _mm512_div_ps simde_mm512_div_ps
#define _mm512_extractf64x4_pd simde_mm512_extractf64x4_pd
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_mask_add_epi32 simde_mm512_mask_add_epi32
#define _mm512_mask_mov_epi32 simde_mm512_mask_mov_epi32
#define _mm512_mask_mov_ps simde_mm512_mask_mov_ps
#define _mm512_max_epi32 simde_mm512_max_epi32
#define _mm512_max_epu32 simde_mm512_max_epu32
#define _mm512_max_ps simde_mm512_max_ps
#define _mm512_min_epi32 simde_mm512_min_epi32
#define _mm512_min_ps simde_mm512_min_ps
#define _mm512_mul_ps simde_mm512_mul_ps
#define _mm512_mullo_epi32 simde_mm512_mullo_epi32
#define _mm512_or_si512 simde_mm512_or_si512
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_set1_ps simde_mm512_set1_ps
#define _mm512_setzero_pd simde_mm512_setzero_pd
#define _mm512_setzero_ps simde_mm512_setzero_ps
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#define _mm512_sqrt_ps simde_mm512_sqrt_ps
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#define _mm512_storeu_pd simde_mm512_storeu_pd
#define _mm512_storeu_ps simde_mm512_storeu_ps
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define _mm512_sub_epi32 simde_mm512_sub_epi32
#define _mm512_sub_ps simde_mm512_sub_ps
#define _mm512_test_epi32_mask simde_mm512_test_epi32_mask
#define _mm512_xor_si512 simde_mm512_xor_si512

namespace emulated {

template <class To, class From>
To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
template <class T, int kCount>
struct Lanes {
    T at[kCount];
};

// One rounding: SIMDe 0.7 multiplies and adds where the machine has no AVX-512.
inline __m512 fma_ps(__m512 a, __m512 b, __m512 c) {
    auto x = bits<Lanes<float, 16>>(a), y = bits<Lanes<float, 16>>(b), z = bits<Lanes<float, 16>>(c);
    for (int i = 0; i < 16; ++i) z.at[i] = __builtin_fmaf(x.at[i], y.at[i], z.at[i]);
    return bits<__m512>(z);
}
inline __m512d fma_pd(__m512d a, __m512d b, __m512d c) {
    auto x = bits<Lanes<double, 8>>(a), y = bits<Lanes<double, 8>>(b), z = bits<Lanes<double, 8>>(c);
    for (int i = 0; i < 8; ++i) z.at[i] = __builtin_fma(x.at[i], y.at[i], z.at[i]);
    return bits<__m512d>(z);
}
inline __m512i widen_u16(__m256i a) {
    const auto x = bits<Lanes<std::uint16_t, 16>>(a);
    Lanes<std::uint32_t, 16> y;
    for (int i = 0; i < 16; ++i) y.at[i] = x.at[i];
    return bits<__m512i>(y);
}
inline __m256i narrow_u32(__m512i a) {
    const auto x = bits<Lanes<std::uint32_t, 16>>(a);
    Lanes<std::uint16_t, 16> y;
    for (int i = 0; i < 16; ++i) y.at[i] = static_cast<std::uint16_t>(x.at[i]);
    return bits<__m256i>(y);
}
template <class T>
__m512i widen_bytes(__m128i a) {
    const auto x = bits<Lanes<T, 16>>(a);
    Lanes<std::int32_t, 16> y;
    for (int i = 0; i < 16; ++i) y.at[i] = x.at[i];
    return bits<__m512i>(y);
}
// most: 255 saturates; with all 32 bits the lower eight are what is left.
inline __m128i narrow_to_bytes(__m512i a, std::uint32_t most) {
    const auto x = bits<Lanes<std::uint32_t, 16>>(a);
    Lanes<std::uint8_t, 16> y;
    for (int i = 0; i < 16; ++i) y.at[i] = static_cast<std::uint8_t>(x.at[i] < most ? x.at[i] : most);
    return bits<__m128i>(y);
}
inline __m512d widen_ps(__m256 a) {
    const auto x = bits<Lanes<float, 8>>(a);
    Lanes<double, 8> y;
    for (int i = 0; i < 8; ++i) y.at[i] = x.at[i];
    return bits<__m512d>(y);
}
// Masked lanes only: a load or store beyond them would be a fault on the real machine too.
template <class Vector, class T, int kCount>
Vector load_masked(unsigned mask, const void* p) {
    Lanes<T, kCount> x{};
    for (int i = 0; i < kCount; ++i) {
        if ((mask >> i) & 1U) std::memcpy(&x.at[i], static_cast<const T*>(p) + i, sizeof(T));
    }
    return bits<Vector>(x);
}
template <class T, int kCount, class Vector>
void store_masked(void* p, unsigned mask, const Vector& v) {
    const auto x = bits<Lanes<T, kCount>>(v);
    for (int i = 0; i < kCount; ++i) {
        if ((mask >> i) & 1U) std::memcpy(static_cast<T*>(p) + i, &x.at[i], sizeof(T));
    }
}

}  // namespace emulated

#define _mm512_fmadd_ps emulated::fma_ps
#define _mm512_fmadd_pd emulated::fma_pd
#define _mm512_cvtepu16_epi32 emulated::widen_u16
#define _mm512_cvtepi32_epi16 emulated::narrow_u32
#define _mm512_cvtepi8_epi32 emulated::widen_bytes<std::int8_t>
#define _mm512_cvtepu8_epi32 emulated::widen_bytes<std::uint8_t>
#define _mm512_cvtepi32_epi8(a) (emulated::narrow_to_bytes(a, 0xffffffffU))
#define _mm512_cvtusepi32_epi8(a) (emulated::narrow_to_bytes(a, 255U))
#define _mm512_cvtps_pd emulated::widen_ps
#define _mm512_maskz_loadu_ps(mask, p) (emulated::load_masked<__m512, float, 16>(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) (emulated::store_masked<float, 16>(p, mask, v))
#define _mm256_maskz_loadu_epi16(mask, p) (emulated::load_masked<__m256i, std::uint16_t, 16>(mask, p))
#define _mm256_mask_storeu_epi16(p, mask, v) (emulated::store_masked<std::uint16_t, 16>(p, mask, v))
