// Eight lanes: AVX2 with FMA3.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../dtypes.h"
#include "../formulas/math.h"
#include "../formulas/storage.h"

namespace lit_fast::avx2 {

struct Wide {
    static constexpr int lanes = 4;
    __m256d value;
    LIT_FAST_INLINE Wide() : value(_mm256_setzero_pd()) {}
    LIT_FAST_INLINE explicit Wide(__m256d v) : value(v) {}
    LIT_FAST_INLINE void store(double* out) const { _mm256_storeu_pd(out, value); }
};
LIT_FAST_INLINE Wide fma(Wide a, Wide b, Wide c) { return Wide(_mm256_fmadd_pd(a.value, b.value, c.value)); }

struct Vec {
    static constexpr int lanes = 8;
    static constexpr bool numbers_only = false;
    __m256 value;
    LIT_FAST_INLINE Vec() : value(_mm256_setzero_ps()) {}
    LIT_FAST_INLINE explicit Vec(float v) : value(_mm256_set1_ps(v)) {}
    LIT_FAST_INLINE explicit Vec(__m256 v) : value(v) {}
    static Vec load(const float* p);
    static Vec load(const bf16* p);
    static Vec load_first(const float* p, int n);
    static Vec load_first(const bf16* p, int n);
    template <int part>
    Wide widen() const;
    static void prefetch(const void* p);
};
LIT_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm256_div_ps(a.value, b.value)); }
LIT_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.value, b.value, c.value)); }
LIT_FAST_INLINE Vec sqrt(Vec a) { return Vec(_mm256_sqrt_ps(a.value)); }
// minps and maxps return their second operand when either is NaN.
LIT_FAST_INLINE Vec clamp(Vec a, Vec low, Vec high) {
    return Vec(_mm256_min_ps(high.value, _mm256_max_ps(low.value, a.value)));
}
LIT_FAST_INLINE Vec max(Vec a, Vec b) {
    const __m256 a_is_nan = _mm256_cmp_ps(a.value, a.value, _CMP_UNORD_Q);
    return Vec(_mm256_blendv_ps(_mm256_max_ps(a.value, b.value), a.value, a_is_nan));
}
LIT_FAST_INLINE Vec sign(Vec a) {
    const __m256 one = _mm256_or_ps(_mm256_and_ps(a.value, _mm256_set1_ps(-0.0F)), _mm256_set1_ps(1.0F));
    return Vec(_mm256_blendv_ps(one, a.value, _mm256_cmp_ps(a.value, _mm256_setzero_ps(), _CMP_EQ_UQ)));
}
template <int part>
LIT_FAST_INLINE Wide Vec::widen() const {
    return Wide(_mm256_cvtps_pd(_mm256_extractf128_ps(value, part)));
}

LIT_FAST_INLINE Vec Vec::load(const float* p) { return Vec(_mm256_loadu_ps(p)); }
LIT_FAST_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.value); }

LIT_FAST_INLINE Vec from_bf16(__m128i halves) {
    return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
// The bf16 in the upper half of each lane, the lower half undefined. To nearest even; not for a NaN.
LIT_FAST_INLINE __m256i number_to_bf16(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
// The same for all values; every NaN becomes 0x7fc0, as in torch.
LIT_FAST_INLINE __m256i rounded_to_bf16(Vec a) {
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.value, a.value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(number_to_bf16(a), _mm256_set1_epi32(0x7fc00000), is_nan);
}
LIT_FAST_INLINE __m128i to_bf16(Vec a) {
    const __m256i words = _mm256_srli_epi32(rounded_to_bf16(a), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
LIT_FAST_INLINE Vec Vec::load(const bf16* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
LIT_FAST_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }

// The first n lanes, 0 < n < 8; nothing outside them is read or written, other lanes load as zero.
LIT_FAST_INLINE __m256i first_lanes(int n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), index);
}
LIT_FAST_INLINE Vec Vec::load_first(const float* p, int n) { return Vec(_mm256_maskload_ps(p, first_lanes(n))); }
LIT_FAST_INLINE void store_first(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.value); }
// AVX2 has no mask for 16-bit elements: they pass through a vector on the stack.
LIT_FAST_INLINE Vec Vec::load_first(const bf16* p, int n) {
    __m128i halves = _mm_setzero_si128();
    __builtin_memcpy(&halves, p, static_cast<unsigned>(n) * sizeof(bf16));
    return from_bf16(halves);
}
LIT_FAST_INLINE void store_first(bf16* p, Vec a, int n) {
    const __m128i halves = to_bf16(a);
    __builtin_memcpy(p, &halves, static_cast<unsigned>(n) * sizeof(bf16));
}

LIT_FAST_INLINE void Vec::prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Sixteen elements as two vectors, those at even and those at odd places: widening bf16 is then one shift or one mask,
// and narrowing needs no shuffle. Elementwise loops do not mind the order.
//
// In a step of bf16 alone the instructions are the limit, not memory (30 cycles for eight elements, where two cores
// share memory at 20), so this one leaves out what only a NaN needs: see numbers_only in loops.h.
struct Pair {
    static constexpr int lanes = 16;
    static constexpr bool numbers_only = true;
    using Half = Vec;
    Vec even, odd;
    LIT_FAST_INLINE Pair() {}
    LIT_FAST_INLINE explicit Pair(float v) : even(v), odd(v) {}
    LIT_FAST_INLINE Pair(Vec e, Vec o) : even(e), odd(o) {}
    static Pair load(const bf16* p);
    static Pair load(const float* p);
    LIT_FAST_INLINE static void prefetch(const void* p) { Vec::prefetch(p); }
    // As it lies in registers.
    LIT_FAST_INLINE static Pair load_parts(const float* p) { return {Vec::load(p), Vec::load(p + Vec::lanes)}; }
    LIT_FAST_INLINE void store_parts(float* p) const;
};
LIT_FAST_INLINE void Pair::store_parts(float* p) const {
    store(p, even);
    store(p + Vec::lanes, odd);
}
LIT_FAST_INLINE Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
LIT_FAST_INLINE Pair operator-(Pair a, Pair b) { return {a.even - b.even, a.odd - b.odd}; }
LIT_FAST_INLINE Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
LIT_FAST_INLINE Pair operator/(Pair a, Pair b) { return {a.even / b.even, a.odd / b.odd}; }
LIT_FAST_INLINE Pair fma(Pair a, Pair b, Pair c) { return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)}; }
// One multiplication and two fused ones in the place of a division, which is three times as long: x * (1/d) and one
// correction by the exact remainder, which is the correctly rounded quotient (Markstein 1990, "Computation of
// elementary functions on the IBM RISC System/6000 processor"); NaN where x is infinite.
LIT_FAST_INLINE Pair quotient(Pair x, const Divisor& d) {
    const Pair inverse(d.inverse);
    const Pair q = x * inverse;
    return fma(fma(Pair(-d.value), q, x), inverse, q);
}
LIT_FAST_INLINE bool are_numbers(Pair a) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.even.value, a.odd.value, _CMP_UNORD_Q)) == 0;
}
LIT_FAST_INLINE Pair sqrt(Pair a) { return {sqrt(a.even), sqrt(a.odd)}; }
LIT_FAST_INLINE Pair max(Pair a, Pair b) { return {max(a.even, b.even), max(a.odd, b.odd)}; }
LIT_FAST_INLINE Pair sign(Pair a) { return {sign(a.even), sign(a.odd)}; }
LIT_FAST_INLINE Pair clamp(Pair a, Pair low, Pair high) {
    return {clamp(a.even, low.even, high.even), clamp(a.odd, low.odd, high.odd)};
}
LIT_FAST_INLINE Pair pair_of(__m256i halves) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
    return {Vec(_mm256_castsi256_ps(_mm256_slli_epi32(halves, 16))),
            Vec(_mm256_castsi256_ps(_mm256_and_si256(halves, high)))};
}
// To nearest even, for numbers: the upper halves go up by one where the lower ones are above 0x8000, or are 0x8000 and
// the upper one is odd. In 16-bit lanes that is two instructions for eight elements less than in 32-bit ones.
LIT_FAST_INLINE __m256i halves_of(Pair a) {
    const __m256i even = _mm256_castps_si256(a.even.value);
    const __m256i odd = _mm256_castps_si256(a.odd.value);
    const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
    const __m256i lower = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    const __m256i is_even = _mm256_andnot_si256(upper, _mm256_set1_epi16(1));
    return _mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_subs_epu16(lower, is_even), 15));
}
LIT_FAST_INLINE Pair Pair::load(const bf16* p) {
    return pair_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LIT_FAST_INLINE void store(bf16* p, Pair a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves_of(a)); }
// Of the 128-bit halves (0 to 3, 8 to 11) and (4 to 7, 12 to 15) shuffles within halves make what is even and odd, in
// the order (0 2 4 6, 8 10 12 14); and unpacking them gives the halves back.
LIT_FAST_INLINE Pair Pair::load(const float* p) {
    const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
    const __m256 first = _mm256_permute2f128_ps(a, b, 0x20), second = _mm256_permute2f128_ps(a, b, 0x31);
    return {Vec(_mm256_shuffle_ps(first, second, 0x88)), Vec(_mm256_shuffle_ps(first, second, 0xdd))};
}
LIT_FAST_INLINE void store(float* p, Pair a) {
    const __m256 first = _mm256_unpacklo_ps(a.even.value, a.odd.value);
    const __m256 second = _mm256_unpackhi_ps(a.even.value, a.odd.value);
    _mm256_storeu_ps(p, _mm256_permute2f128_ps(first, second, 0x20));
    _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(first, second, 0x31));
}

using BfloatVec = Pair;  // for a step of nothing but bf16

// ---- A Pair in 8-bit codes and stochastic rounding (coded.h); all of this as formulas/storage.h defines it ----

// The random words of sixteen neighbours: one for each two of them.
struct Chances {
    static constexpr int words = 8;
    __m256i even;
    LIT_FAST_INLINE __m256i odd() const { return _mm256_mullo_epi32(even, all(kNeighbour)); }
    LIT_FAST_INLINE static __m256i all(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
};
// Those of the next sixteen, and so on.
struct Dice {
    __m256i weyl, second;
    LIT_FAST_INLINE Dice(std::uint32_t index, RandomKey key)
        : weyl(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), Chances::all(kWeyl))),
          second(Chances::all(key.second)) {
        weyl = _mm256_add_epi32(weyl, Chances::all((index >> 1) * kWeyl + key.first));
    }
    LIT_FAST_INLINE Chances next() {
        __m256i x = _mm256_xor_si256(weyl, _mm256_srli_epi32(weyl, kFirstShift));
        weyl = _mm256_add_epi32(weyl, Chances::all(Chances::words * kWeyl));
        x = _mm256_add_epi32(_mm256_mullo_epi32(x, Chances::all(kMix)), second);
        return {_mm256_xor_si256(x, _mm256_srli_epi32(x, kLastShift))};
    }
};

// The bits of the largest magnitude so far; a NaN's are above those of all numbers.
struct Extremes {
    __m256i bits = _mm256_setzero_si256();
    template <bool kSigned>
    LIT_FAST_INLINE void add(Pair a) {
        __m256i even = _mm256_castps_si256(a.even.value), odd = _mm256_castps_si256(a.odd.value);
        if constexpr (kSigned) {
            const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
            even = _mm256_and_si256(even, magnitude);
            odd = _mm256_and_si256(odd, magnitude);
        }
        bits = _mm256_max_epu32(bits, _mm256_max_epu32(even, odd));
    }
    LIT_FAST_INLINE std::uint32_t largest() const {
        __m128i x = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0b01001110));
        x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0b10110001));
        return static_cast<std::uint32_t>(_mm_cvtsi128_si32(x));
    }
};
// Whether no NaN has come by.
struct Numbers {
    __m256 none = _mm256_setzero_ps();
    LIT_FAST_INLINE void add(Pair a) {
        none = _mm256_or_ps(none, _mm256_cmp_ps(a.even.value, a.odd.value, _CMP_UNORD_Q));
    }
    LIT_FAST_INLINE bool all() const { return _mm256_movemask_ps(none) == 0; }
};

// state_bits(word, k)
template <int k>
LIT_FAST_INLINE __m256i state_chance(__m256i words) {
    if constexpr (k == 1) return _mm256_srli_epi32(words, 12);
    return _mm256_and_si256(_mm256_srli_epi32(words, k == 0 ? 4 : 8), Chances::all(kDropped));
}

// The upper halves of sixteen float32 numbers once a chance has been added to what codes have not.
template <int k>
LIT_FAST_INLINE __m256i raised(Pair x, const Chances& chances) {
    const __m256i even = _mm256_add_epi32(_mm256_castps_si256(x.even.value), state_chance<k>(chances.even));
    const __m256i odd = _mm256_add_epi32(_mm256_castps_si256(x.odd.value), state_chance<k>(chances.odd()));
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

// For a step with 8-bit moments. A code differs from the upper bits of its float32 by an offset, which is that of the
// exponents and the scale's: all of this takes codes of normal numbers alone.
struct Coded {
    using V = Pair;
    using Chances = avx2::Chances;
    using Dice = avx2::Dice;
    using Extremes = avx2::Extremes;
    using Numbers = avx2::Numbers;
    using Offset = __m256i;

    template <bool kSigned>
    LIT_FAST_INLINE static Offset encode_offset(float scale) {
        constexpr std::uint32_t kBinades = kSigned ? kSignedBinades : kUnsignedBinades;
        const std::uint32_t offset = ((bits_of(scale) >> 23) - kBinades) * 8U;
        return _mm256_set1_epi16(static_cast<short>(offset));  // of zero: above all numbers
    }
    template <bool kSigned>
    LIT_FAST_INLINE static Offset decode_offset(float scale) {
        return _mm256_slli_epi16(encode_offset<kSigned>(scale), 4);
    }
    // A code of zero takes no offset: vpsignw gives it the magnitude's sign, which is zero's.
    template <bool kSigned>
    LIT_FAST_INLINE static Pair decoded(const std::uint8_t* codes, Offset offset) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        if constexpr (kSigned) {
            const __m256i code = _mm256_cvtepi8_epi16(bytes);  // the sign in all of the upper half
            const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(127));
            const __m256i shifted =
                _mm256_and_si256(_mm256_slli_epi16(code, 4), _mm256_set1_epi16(INT16_MIN | 127 << 4));
            return pair_of(_mm256_add_epi16(shifted, _mm256_sign_epi16(offset, magnitude)));
        } else {
            const __m256i code = _mm256_cvtepu8_epi16(bytes);
            return pair_of(_mm256_add_epi16(_mm256_slli_epi16(code, 4), _mm256_sign_epi16(offset, code)));
        }
    }
    LIT_FAST_INLINE static void store_by_chance(bf16* p, Pair a, const Chances& chances) {
        const __m256i low = Chances::all(param_bits(~0U));
        const __m256i even = _mm256_add_epi32(_mm256_castps_si256(a.even.value), _mm256_and_si256(chances.even, low));
        const __m256i odd = _mm256_add_epi32(_mm256_castps_si256(a.odd.value), _mm256_and_si256(chances.odd(), low));
        const __m256i halves = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
    }
    template <bool kSigned, int k>
    LIT_FAST_INLINE static void store_codes(std::uint8_t* codes, Pair a, Pair b, Offset offset, const Chances& of_a,
                                            const Chances& of_b) {
        const __m256i upper_a = raised<k>(a, of_a), upper_b = raised<k>(b, of_b);
        __m256i packed =
            _mm256_packus_epi16(magnitudes<kSigned>(upper_a, offset), magnitudes<kSigned>(upper_b, offset));
        if constexpr (kSigned) {
            const __m256i signs = _mm256_and_si256(_mm256_packs_epi16(upper_a, upper_b), _mm256_set1_epi8(INT8_MIN));
            packed = _mm256_or_si256(packed, signs);
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permute4x64_epi64(packed, 0b11011000));
    }

  private:
    template <bool kSigned>
    LIT_FAST_INLINE static __m256i magnitudes(__m256i upper, Offset offset) {
        if constexpr (kSigned) return _mm256_subs_epu16(_mm256_srli_epi16(_mm256_slli_epi16(upper, 1), 5), offset);
        const __m256i bits = _mm256_srli_epi16(upper, 4);
        return _mm256_max_epu16(_mm256_subs_epu16(bits, offset), _mm256_min_epu16(bits, _mm256_set1_epi16(1)));
    }
};

}  // namespace lit_fast::avx2
