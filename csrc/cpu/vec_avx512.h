// Sixteen lanes: AVX-512 F, BW and VL. Conversions to bf16 are done with integers because VCVTNEPS2BF16 flushes
// denormals.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../dtypes.h"
#include "../formulas/math.h"
#include "../formulas/storage.h"

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
    static Vec load_parts(const float* p);
    void store_parts(float* p) const;
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

// ---- A Vec in 8-bit codes and stochastic rounding (coded.h); all of this as formulas/storage.h defines it ----

LIT_FAST_INLINE Vec Vec::load_parts(const float* p) { return load(p); }
LIT_FAST_INLINE void Vec::store_parts(float* p) const { store(p, *this); }

// For a step with 8-bit moments. A code differs from the upper bits of its float32 by an offset, which is that of the
// exponents and the scale's: all of this takes codes of normal numbers alone.
struct Coded {
    using V = Vec;
    using Offset = __m512i;
    using Chances = __m512i;  // a random word each

    LIT_FAST_INLINE static __m512i all(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }

    // The random words of sixteen elements, then of the next sixteen, and so on.
    struct Dice {
        __m512i weyl, second, neighbours;
        LIT_FAST_INLINE Dice(std::uint32_t index, RandomKey key) : second(all(key.second)) {
            alignas(64) static constexpr std::uint32_t kPairs[] = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
            alignas(64) static constexpr std::uint32_t kFactors[] = {1, kNeighbour, 1, kNeighbour, 1, kNeighbour,
                                                                     1, kNeighbour, 1, kNeighbour, 1, kNeighbour,
                                                                     1, kNeighbour, 1, kNeighbour};
            const __m512i pair = _mm512_add_epi32(_mm512_loadu_si512(kPairs), all(index >> 1));
            weyl = _mm512_add_epi32(_mm512_mullo_epi32(pair, all(kWeyl)), all(key.first));
            neighbours = _mm512_loadu_si512(kFactors);
        }
        LIT_FAST_INLINE Chances next() {
            __m512i x = _mm512_xor_si512(weyl, _mm512_srli_epi32(weyl, kFirstShift));
            weyl = _mm512_add_epi32(weyl, all(8 * kWeyl));
            x = _mm512_add_epi32(_mm512_mullo_epi32(x, all(kMix)), second);
            return _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, kLastShift)), neighbours);
        }
    };

    // The bits of the largest magnitude so far; a NaN's are above those of all numbers.
    struct Extremes {
        __m512i bits = all(0);
        template <bool kSigned>
        LIT_FAST_INLINE void add(Vec a) {
            bits = _mm512_max_epu32(bits, magnitude<kSigned>(a));
        }
        LIT_FAST_INLINE std::uint32_t largest() const {
            alignas(64) std::uint32_t lanes[16];
            _mm512_storeu_si512(lanes, bits);
            std::uint32_t most = 0;
            for (const std::uint32_t lane : lanes) most = lane > most ? lane : most;
            return most;
        }
    };
    // Whether no NaN has come by.
    struct Numbers {
        __mmask16 none = 0;
        LIT_FAST_INLINE void add(Vec a) {
            none = static_cast<__mmask16>(none | _mm512_cmp_ps_mask(a.value, a.value, _CMP_UNORD_Q));
        }
        LIT_FAST_INLINE bool all() const { return none == 0; }
    };

    LIT_FAST_INLINE static void store_by_chance(bf16* p, Vec a, Chances chances) {
        const __m512i chance = _mm512_and_si512(chances, all(param_bits(~0U)));
        const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(a.value), chance);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
    }

    template <bool kSigned>
    LIT_FAST_INLINE static Offset encode_offset(float scale) {
        constexpr std::uint32_t kBinades = kSigned ? kSignedBinades : kUnsignedBinades;
        return all(scale == 0.0F ? 0xfffU : ((bits_of(scale) >> 23) - kBinades) * 8U);  // of zero: above all numbers
    }
    template <bool kSigned>
    LIT_FAST_INLINE static Offset decode_offset(float scale) {
        return _mm512_slli_epi32(encode_offset<kSigned>(scale), 20);
    }
    // A code of zero takes no offset.
    template <bool kSigned>
    LIT_FAST_INLINE static Vec decoded(const std::uint8_t* codes, Offset offset) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m512i code = kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
        const __m512i magnitude = kSigned ? _mm512_and_si512(code, all(127U)) : code;
        const __mmask16 above_zero = _mm512_test_epi32_mask(magnitude, magnitude);
        const __m512i shifted = _mm512_slli_epi32(magnitude, 20);
        __m512i bits = _mm512_mask_add_epi32(shifted, above_zero, shifted, offset);
        if constexpr (kSigned) bits = _mm512_or_si512(bits, _mm512_and_si512(code, all(0x80000000U)));
        return Vec(_mm512_castsi512_ps(bits));
    }
    template <bool kSigned, int k>
    LIT_FAST_INLINE static void store_codes(std::uint8_t* codes, Vec a, Vec b, Offset offset, Chances of_a,
                                            Chances of_b) {
        store_codes<kSigned, k>(codes, a, offset, of_a);
        store_codes<kSigned, k>(codes + Vec::lanes, b, offset, of_b);
    }

  private:
    template <bool kSigned>
    LIT_FAST_INLINE static __m512i magnitude(Vec a) {
        const __m512i bits = _mm512_castps_si512(a.value);
        return kSigned ? _mm512_and_si512(bits, all(0x7fffffffU)) : bits;
    }
    template <bool kSigned, int k>
    LIT_FAST_INLINE static void store_codes(std::uint8_t* codes, Vec a, Offset offset, Chances chances) {
        const __m512i from = _mm512_srli_epi32(chances, k == 0 ? 4 : k == 1 ? 12 : 8);  // state_bits
        const __m512i chance = k == 1 ? from : _mm512_and_si512(from, all(kDropped));
        const __m512i raised = _mm512_srli_epi32(_mm512_add_epi32(magnitude<kSigned>(a), chance), 20);
        const __m512i code = _mm512_sub_epi32(raised, offset);
        __m128i bytes;
        if constexpr (kSigned) {
            const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(a.value), 24), all(128U));
            bytes = _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_max_epi32(code, all(0U)), sign));
        } else {
            bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(code, _mm512_min_epi32(raised, all(1U))));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), bytes);
    }
};

}  // namespace lit_fast::avx512
