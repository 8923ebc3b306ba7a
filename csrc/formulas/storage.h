// How float32 values are kept in fewer bits, element by element: the only place that knows the bits.
//
// Plain integer and float code without branches or calls, so that a loop over it becomes vector code on every target
// and gives the same bits there.
//
// 8-bit states are codes c, and for each block of kCodeBlock elements a scale, which is the least power of two of which
// 1.875 are no less than the block's largest magnitude; three bits of mantissa follow the leading one:
//     signed    c in 0..127 and a sign    scale * (1 + (c mod 8) / 8) * 2^(c div 8 - 15)     codes 0, 128 are zero
//     unsigned  c in 0..255               scale * (1 + (c mod 8) / 8) * 2^(c div 8 - 31)     code 0 is zero
// A value is exact then, and a code's bits are the upper ones of a float32 after an addition of exponents. The idea of
// one scale a block: Dettmers et al., "8-bit optimizers via block-wise quantization", 2022 (arXiv:2110.02861), whose
// code table needs a search and a lookup. Codes are always rounded stochastically: with beta2 = 0.999 a moment moves by
// 0.1 % a step, the codes lie 6 to 12 % apart, and rounding to nearest would never move it. A second moment that is not
// zero never becomes zero, its root divides; but for one below 2^-129, or in a block whose largest is below 2^-120,
// which is zero throughout. A signed one below the smallest code becomes zero. Blocks whose largest is above 1.6e38 end
// there.
//
// The remainder of a bfloat16 parameter is the signed distance to its float32 value in units of the lower 16 bits,
//     float32 bits = (bfloat16 bits << 16) + remainder,      bfloat16 bits = (float32 bits + 0x8000) >> 16
// which loses nothing (apex's DistributedFusedAdam and Transformer Engine keep weights so, too).
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "math.h"

namespace lit_fast {

constexpr int kCodeBlock = 256;  // elements that share a scale

LIT_FAST_INLINE std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
LIT_FAST_INLINE float float_of(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// ---- random bits: a function of (seed, step, global index of the element) ----

struct RandomKey {
    std::uint32_t first, second;
};

// Two words for the elements whose global index has the upper half `index >> 32`. The mixing function is SplitMix64's
// (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
LIT_FAST_INLINE RandomKey random_key(std::uint64_t seed, std::uint64_t step, std::uint64_t index) {
    std::uint64_t x = seed;
    const std::uint64_t words[] = {step, index >> 32};
    for (const std::uint64_t word : words) {
        x += word * 0x9e3779b97f4a7c15U + 0x9e3779b97f4a7c15U;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
        x ^= x >> 31;
    }
    return {static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(x >> 32)};
}

// What an element is rounded with: param_bits for the parameter, state_bits for its state k.
//
// Neighbours (2i, 2i + 1) share a mixing of i: a Weyl sequence and one round of shift and product, whose constants are
// those of a search for the least correlation of rounded values at all distances up to 8,192 (the worst: 0.7 %). The
// second one of them takes a product of the first one's bits, a linear congruential step, whose multiplier was searched
// for so that pairs of successive numbers lie evenly in the plane whether 16, 20, 28 or all 32 bits are taken (shortest
// vector of the dual lattice, Knuth, "The Art of Computer Programming", volume 2, section 3.3.4: 0.95 of the best there
// can be).
constexpr std::uint32_t kWeyl = 0x705b0767U, kMix = 0xd2c6c9a1U, kNeighbour = 0x521a3badU;
constexpr int kFirstShift = 13, kLastShift = 15;

LIT_FAST_INLINE std::uint32_t random_bits(std::uint32_t index, RandomKey key) {
    std::uint32_t x = (index >> 1) * kWeyl + key.first;
    x = (x ^ (x >> kFirstShift)) * kMix + key.second;
    x ^= x >> kLastShift;
    return (index & 1U) != 0 ? x * kNeighbour : x;
}
// 16 bits for the parameter, and 20 for state k. They begin at four different bits, those of the first two states eight
// from the parameter's and from one another's, and it is the first few that decide.
LIT_FAST_INLINE std::uint32_t param_bits(std::uint32_t random) { return random & 0xffffU; }
LIT_FAST_INLINE std::uint32_t state_bits(std::uint32_t random, int k) {
    return (random >> (k == 0 ? 4 : k == 1 ? 12 : 8)) & 0xfffffU;
}

// ---- bfloat16 ----

LIT_FAST_INLINE float widen(bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

// To nearest even; every NaN becomes 0x7fc0, as in torch.
LIT_FAST_INLINE bf16 nearest_bf16(float x) {
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    return {static_cast<std::uint16_t>(x != x ? 0x7fc0U : rounded)};
}

// Up with the probability that the bits dropped are of one unit: the expected value is x.
// chance: 16 random bits.
LIT_FAST_INLINE bf16 stochastic_bf16(float x, std::uint32_t chance) {
    const std::uint32_t rounded = (bits_of(x) + chance) >> 16;
    return {static_cast<std::uint16_t>(x != x ? 0x7fc0U : rounded)};
}

LIT_FAST_INLINE bf16 upper_half(float x) {
    const std::uint32_t rounded = (bits_of(x) + 0x8000U) >> 16;
    return {static_cast<std::uint16_t>(x != x ? 0x7fc0U : rounded)};
}
LIT_FAST_INLINE std::int16_t remainder_of(float x) {
    return static_cast<std::int16_t>(static_cast<std::uint16_t>(x != x ? 0U : bits_of(x)));
}
LIT_FAST_INLINE float rebuilt(bf16 upper, std::int16_t remainder) {
    return float_of((static_cast<std::uint32_t>(upper.bits) << 16) + static_cast<std::uint32_t>(remainder));
}

// ---- float16 ----

// Exact, denormals included, without arithmetic on float32 denormals (which a process may have switched off).
LIT_FAST_INLINE float widen(f16 x) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffU) << 13;
    const std::uint32_t normal = magnitude + (112U << 23);
    const std::uint32_t tiny = bits_of(float_of(magnitude + (113U << 23)) - float_of(113U << 23));
    const std::uint32_t special = magnitude | 0x7f800000U;
    const std::uint32_t finite = magnitude < 0x00800000U ? tiny : normal;
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
    return float_of(sign | (magnitude >= 0x0f800000U ? special : finite));
}

// To nearest even, infinite from 65520 on; every NaN becomes 0x7e00 with its sign.
LIT_FAST_INLINE f16 nearest_f16(float x) {
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    // Below 2^-14 adding 0.5 leaves the result's bits in the lowest place, rounded by the addition itself.
    const std::uint32_t tiny = bits_of(float_of(magnitude) + 0.5F) - 0x3f000000U;
    const std::uint32_t normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
    std::uint32_t result = magnitude < 0x38800000U ? tiny : normal;
    result = magnitude >= 0x477ff000U ? 0x7c00U : result;
    result = magnitude > 0x7f800000U ? 0x7e00U : result;
    return {static_cast<std::uint16_t>(sign | result)};
}

LIT_FAST_INLINE float widen(float x) { return x; }

// ---- 8-bit codes ----

constexpr int kSignedBinades = 15, kUnsignedBinades = 31;
constexpr std::uint32_t kSignedOffset = (127 - kSignedBinades) << 3;
constexpr std::uint32_t kUnsignedOffset = (127 - kUnsignedBinades) << 3;
constexpr std::uint32_t kLeastOfBlock = 0x03800000U;  // 2^-120; a block below it is zero
constexpr std::uint32_t kDropped = 0xfffffU;          // the bits of a float32 that a code has not
constexpr std::uint32_t kLargestScale = 253U << 23;   // 2^126: its inverse has no denormal

// largest: magnitude of the block as bits, which order like the numbers; infinity and NaN, above all, stay what they
// are.
LIT_FAST_INLINE float scale_of(std::uint32_t largest) {
    const std::uint32_t power = (largest + kDropped) & 0x7f800000U;
    const std::uint32_t scale = power < kLargestScale ? power : kLargestScale;
    const std::uint32_t number = largest < kLeastOfBlock ? 0U : scale;
    return float_of(largest < 0x7f800000U ? number : largest);
}
// 0 for a scale that is zero, infinite or NaN.
LIT_FAST_INLINE float inverse_scale(float scale) {
    const std::uint32_t bits = bits_of(scale);
    return float_of(bits == 0U || bits > kLargestScale ? 0U : (254U << 23) - bits);
}

// In units of the scale a code is a bfloat16 number: half as many instructions to find it as for a float32.
LIT_FAST_INLINE bf16 units_unsigned(std::uint8_t code) {
    const auto bits = static_cast<std::uint16_t>((code + kUnsignedOffset) << 4);
    return {static_cast<std::uint16_t>(code == 0 ? 0 : bits)};
}
LIT_FAST_INLINE bf16 units_signed(std::uint8_t code) {
    const auto magnitude = static_cast<std::uint16_t>(code & 127U);
    const auto bits = static_cast<std::uint16_t>((magnitude + kSignedOffset) << 4);
    const auto sign = static_cast<std::uint16_t>((code & 128U) << 8);
    return {static_cast<std::uint16_t>((magnitude == 0 ? 0 : bits) | sign)};
}
LIT_FAST_INLINE float decoded_unsigned(std::uint8_t code, float scale) { return widen(units_unsigned(code)) * scale; }
LIT_FAST_INLINE float decoded_signed(std::uint8_t code, float scale) { return widen(units_signed(code)) * scale; }

// inverse: that of the block's scale. chance: 20 random bits, as many as a code drops.
LIT_FAST_INLINE std::uint8_t encoded_unsigned(float x, float inverse, std::uint32_t chance) {
    const auto code =
        static_cast<std::int32_t>((bits_of(x * inverse) + chance) >> 20) - static_cast<std::int32_t>(kUnsignedOffset);
    const auto above_zero = inverse > 0.0F ? static_cast<std::int32_t>((bits_of(x) + chance) >> 20) : 0;
    const std::int32_t least = above_zero < 1 ? above_zero : 1;
    const std::int32_t low = code < least ? least : code;
    return static_cast<std::uint8_t>(low > 255 ? 255 : low);
}
LIT_FAST_INLINE std::uint8_t encoded_signed(float x, float inverse, std::uint32_t chance) {
    const std::uint32_t magnitude = bits_of(x * inverse) & 0x7fffffffU;
    const std::int32_t code =
        static_cast<std::int32_t>((magnitude + chance) >> 20) - static_cast<std::int32_t>(kSignedOffset);
    const std::int32_t low = code < 0 ? 0 : code;
    const std::int32_t high = low > 127 ? 127 : low;
    // x's own sign: the NaN that an infinite x makes of the product has the machine's.
    return static_cast<std::uint8_t>(static_cast<std::uint32_t>(high) | ((bits_of(x) >> 24) & 128U));
}

}  // namespace lit_fast
