// csrc/formulas/storage.h, value by value: every 16-bit pattern and every code, float32 values around each of them, and
// random ones, against arithmetic in float64. Also that scalar code and the vectors of AVX2 divide by a Divisor alike.
#include <algorithm>
#include <cmath>

#include "cases.h"
#include "formulas/storage.h"
#if defined(__AVX2__)
#include "cpu/vec_avx2.h"
#endif

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

Tally tally;

void expect(bool condition, const char* what, std::uint32_t bits) {
    if (!tally.expect(condition)) std::printf("%s: %08x\n", what, static_cast<unsigned>(bits));
}

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The value of a 16-bit pattern with that many bits of exponent and mantissa, as IEEE 754 defines it.
double value_of(unsigned bits, int exponent_bits, int mantissa_bits) {
    const unsigned mantissa = bits & ((1U << mantissa_bits) - 1U);
    const int exponent = static_cast<int>((bits & 0x7fffU) >> mantissa_bits);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * kInf : kNan;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1U << mantissa_bits), exponent - bias - mantissa_bits);
}

// The nearest pattern: of the two neighbours the nearer one, of two as near the even one. Patterns of positive numbers
// order like the numbers; past the largest one comes infinity, which rounds as if it were the next number.
template <int kExponentBits, int kMantissaBits>
std::uint16_t nearest_by_definition(float x) {
    constexpr unsigned kInfinite = ((1U << kExponentBits) - 1U) << kMantissaBits;
    const double magnitude = std::fabs(static_cast<double>(x));
    unsigned low = 0, high = kInfinite;  // value(low) <= magnitude < value(high)
    if (std::isinf(x)) low = high;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        (value_of(middle, kExponentBits, kMantissaBits) <= magnitude ? low : high) = middle;
    }
    if (low + 1 == high) {
        const double below = value_of(low, kExponentBits, kMantissaBits);
        const double step = high == kInfinite ? below - value_of(low - 1, kExponentBits, kMantissaBits)
                                              : value_of(high, kExponentBits, kMantissaBits) - below;
        const double over = magnitude - below;
        if (over > step / 2 || (over == step / 2 && low % 2 == 1)) low = high;
    }
    return static_cast<std::uint16_t>(low | (std::signbit(x) ? 0x8000U : 0U));
}

void check_nearest(float x) {
    if (std::isnan(x)) {
        expect(nearest_bf16(x).bits == 0x7fc0U, "bfloat16 NaN", bits_of(x));
        expect(nearest_f16(x).bits == (0x7e00U | (bits_of(x) >> 16 & 0x8000U)), "float16 NaN", bits_of(x));
        return;
    }
    expect((nearest_bf16(x).bits == nearest_by_definition<8, 7>(x)), "nearest bfloat16", bits_of(x));
    expect((nearest_f16(x).bits == nearest_by_definition<5, 10>(x)), "nearest float16", bits_of(x));
}

void check_halves() {
    for (unsigned bits = 0; bits < 0x10000U; ++bits) {
        const f16 half{static_cast<std::uint16_t>(bits)};
        const bf16 brain{static_cast<std::uint16_t>(bits)};
        const double half_value = value_of(bits, 5, 10), brain_value = value_of(bits, 8, 7);
        if (std::isnan(half_value)) {
            expect(std::isnan(widen(half)), "float16 NaN", bits);
        } else {
            expect(same(widen(half), static_cast<float>(half_value)), "widened float16", bits);
            expect(nearest_f16(widen(half)).bits == bits, "float16 there and back", bits);
        }
        if (std::isnan(brain_value)) {
            expect(std::isnan(widen(brain)), "bfloat16 NaN", bits);
            continue;
        }
        expect(same(widen(brain), static_cast<float>(brain_value)), "widened bfloat16", bits);
        expect(nearest_bf16(widen(brain)).bits == bits, "bfloat16 there and back", bits);
        // Ties and their neighbours, on both sides of every value.
        for (const float middle : {widen(brain), widen(half)}) {
            for (const std::uint32_t offset : {0x0fffU, 0x1000U, 0x1001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU}) {
                check_nearest(float_of(bits_of(middle) + offset));
                check_nearest(float_of(bits_of(middle) - offset));
            }
        }
    }
    for (std::uint32_t exponent = 0; exponent < 256; ++exponent) {
        for (int i = 0; i < 4096; ++i) check_nearest(float_of(exponent << 23 | (random_word() & 0x807fffffU)));
    }
}

// Over all 2^16 chances a value goes up as often as the 16 bits it drops say.
void check_stochastic() {
    for (int i = 0; i < 64; ++i) {
        const float x = i == 0 ? kInf : i == 1 ? 0.0F : any_value();
        const std::uint32_t upper = bits_of(x) >> 16;
        std::uint32_t ups = 0;
        bool neighbours = true;
        for (std::uint32_t chance = 0; chance < 0x10000U; ++chance) {
            const std::uint32_t rounded = stochastic_bf16(x, chance).bits;
            ups += rounded == upper + 1U ? 1U : 0U;
            neighbours = neighbours && (rounded == upper || rounded == upper + 1U);
        }
        if (std::isnan(x)) {
            expect(stochastic_bf16(x, 0xffffU).bits == 0x7fc0U, "stochastic NaN", bits_of(x));
        } else {
            expect(neighbours && ups == (bits_of(x) & 0xffffU), "chance to go up", bits_of(x));
        }
    }
}

void check_remainder(std::uint32_t bits) {
    const float x = float_of(bits);
    const float back = rebuilt(upper_half(x), remainder_of(x));
    expect(std::isnan(x) ? std::isnan(back) : bits_of(back) == bits, "float32 from bfloat16 and remainder", bits);
}

void check_remainders() {
    for (std::uint32_t upper = 0; upper < 0x10000U; ++upper) {
        for (const std::uint32_t lower : {0U, 1U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU}) {
            check_remainder(upper << 16 | lower);
        }
    }
    for (int i = 0; i < 1 << 22; ++i) check_remainder(random_word());
    for (const float x : {kInf, -kInf, 3.4028234664e38F, -3.4028234664e38F}) check_remainder(bits_of(x));
}

template <bool kSigned>
float decoded(unsigned code, float scale) {
    return kSigned ? decoded_signed(static_cast<std::uint8_t>(code), scale)
                   : decoded_unsigned(static_cast<std::uint8_t>(code), scale);
}
template <bool kSigned>
unsigned encoded(float x, float inverse, std::uint32_t chance) {
    return kSigned ? encoded_signed(x, inverse, chance) : encoded_unsigned(x, inverse, chance);
}

template <bool kSigned>
void check_codes() {
    constexpr unsigned kLast = kSigned ? 127 : 255;
    constexpr int kBias = kSigned ? 15 : 31;
    expect(decoded<kSigned>(0, 1.0F) == 0.0F, "code of zero", 0);
    for (unsigned code = 1; code <= kLast; ++code) {
        const double by_definition = std::ldexp(1.0 + code % 8 / 8.0, static_cast<int>(code / 8) - kBias);
        expect(decoded<kSigned>(code, 1.0F) == by_definition, "value of a code", code);
        expect(decoded<kSigned>(code, 1.0F) > decoded<kSigned>(code - 1, 1.0F), "codes rise", code);
        if (kSigned) expect(decoded<kSigned>(code | 128U, 1.0F) == -by_definition, "value of a negative code", code);
    }
    // Blocks whose largest magnitude spans what float32 has.
    int exponent;
    for (int i = 0; i < 20000; ++i) {
        const std::uint32_t largest = kLeastOfBlock + random_word() % (kLargestScale - kLeastOfBlock);
        const float top = float_of(largest), scale = scale_of(largest), inverse = inverse_scale(scale);
        expect(std::frexp(scale, &exponent) == 0.5F && scale * inverse == 1.0F, "a power of two", largest);
        const double within = static_cast<double>(top) / scale;
        expect(within <= 1.875 && within > 0.9375, "the least scale that will do", largest);
        for (const std::uint32_t chance : {0U, 0x80000U, 0xfffffU}) {
            expect(encoded<kSigned>(top, inverse, chance) + 8U >= kLast, "the largest has one of the last codes",
                   largest);
            const float x = top * __builtin_fabsf(ordinary_value()) * (i % 2 == 0 ? 1.0F : 1e-3F);
            const unsigned code = encoded<kSigned>(x, inverse, chance);
            const double given = static_cast<double>(x) / scale;
            if (!kSigned && x > 0.0F) expect(code >= 1, "what is above zero stays above it", bits_of(x));
            if (given > decoded<kSigned>(1, 1.0F)) {
                const double below = decoded<kSigned>(code - 1, 1.0F);
                const double above = decoded<kSigned>(code < kLast ? code + 1 : code, 1.0F);
                expect(below <= given && given <= above, "within a code", bits_of(x));
            }
            if (kSigned) expect(encoded<kSigned>(-x, inverse, chance) == (code | 128U), "signs", bits_of(x));
        }
    }
    // A code's own value keeps its code under a scale of one; between two codes the chance is the distance.
    const float one = 1.0F;
    for (unsigned code = 1; code < kLast; ++code) {
        const float low = decoded<kSigned>(code, one), high = decoded<kSigned>(code + 1, one);
        expect(encoded<kSigned>(low, one, 0) == code && encoded<kSigned>(low, one, kDropped) == code, "own code", code);
        for (const float share : {0.25F, 0.5F, 0.75F}) {
            const float x = low + (high - low) * share;
            unsigned ups = 0;
            for (std::uint32_t chance = 0; chance <= kDropped; chance += 1024)
                ups += encoded<kSigned>(x, one, chance) - code;
            expect(ups == static_cast<unsigned>(1024 * share), "chance between codes", code);
        }
    }
    // No scale: an all zero block, or one below 2^-120.
    for (const std::uint32_t largest : {0U, 1U, 0x00800000U, 0x037fffffU}) {
        expect(scale_of(largest) == 0.0F && inverse_scale(0.0F) == 0.0F, "scale of a tiny block", largest);
        expect(encoded<kSigned>(float_of(largest), 0.0F, kDropped) == 0U, "code in a tiny block", largest);
        expect(decoded<kSigned>(kLast, 0.0F) == 0.0F, "value in a tiny block", largest);
    }
    expect(scale_of(kLeastOfBlock) * inverse_scale(scale_of(kLeastOfBlock)) == 1.0F, "the least scale", kLeastOfBlock);
    const float last = scale_of(0x7f7fffffU);
    expect(last == 0x1p126F && encoded<kSigned>(3.4e38F, inverse_scale(last), kDropped) == kLast, "the largest scale",
           0);
    // Infinite and NaN blocks stay visible: nothing in them decodes to a number that is not one.
    for (const std::uint32_t largest : {0x7f800000U, 0x7fc00000U}) {
        const float scale = scale_of(largest), inverse = inverse_scale(scale);
        for (const float x : {0.0F, 1.0F, float_of(largest)}) {
            const float back = decoded<kSigned>(encoded<kSigned>(x, inverse, 0x1234U), scale);
            expect(!std::isfinite(back), "a block that is not finite", largest);
        }
        if (kSigned && std::isinf(scale)) {
            expect(decoded<kSigned>(encoded<kSigned>(kInf, inverse, 0), scale) == kInf, "infinity", largest);
            expect(decoded<kSigned>(encoded<kSigned>(-kInf, inverse, 0), scale) == -kInf, "-infinity", largest);
        }
    }
}

// Every even index has bits of its own under each key, and so has every odd one: no two pairs share their luck by
// construction.
void check_random_bits() {
    const RandomKey key = random_key(7, 3, 0);
    std::vector<std::uint32_t> seen[2];
    for (std::uint32_t i = 0; i < 1U << 20; ++i) {
        const std::uint32_t index = i * 4096U + i % 4096U;
        seen[index & 1U].push_back(random_bits(index, key));
    }
    for (std::vector<std::uint32_t>& of : seen) {
        expect(of.size() == 1U << 19, "as many of both", 0);
        std::sort(of.begin(), of.end());
        expect(std::adjacent_find(of.begin(), of.end()) == of.end(), "random bits repeat", 0);
        // Mean of 16 bits over 2^19 draws: six standard deviations are 6 * 2^16 / sqrt(12 * 2^19) = 157.
        for (int state = -1; state < kMaxStates; ++state) {
            double sum = 0.0;
            for (const std::uint32_t x : of) sum += state < 0 ? param_bits(x) : state_bits(x, state) >> 4;
            expect(std::fabs(sum / (1 << 19) - 32767.5) < 157.0, "mean of random bits",
                   static_cast<std::uint32_t>(state));
        }
    }
    const auto differ = [](RandomKey a, RandomKey b) { return a.first != b.first && a.second != b.second; };
    const RandomKey others[] = {random_key(8, 3, 0), random_key(7, 4, 0), random_key(7, 3, 1ULL << 32)};
    for (const RandomKey& other : others) expect(differ(key, other), "keys repeat", other.first);
    expect(!differ(key, random_key(7, 3, 0xffffffffU)), "a key changes within 2^32 elements", key.first);
}

#if defined(__AVX2__)
// Every mantissa of both parities of exponent, by divisors as AdamW has them: roots of 1 - beta2^t.
void check_quotients() {
    std::vector<double> divisors;
    for (const double beta2 : {0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 0.999999}) {
        for (double step = 1.0; step < 1e5; step = std::floor(step * 2.3) + 1.0) {
            divisors.push_back(std::sqrt(1.0 - std::pow(beta2, step)));
        }
    }
    while (divisors.size() < 300) divisors.push_back(1e-4 + static_cast<double>(random_word()) / 4294967296.0);
    for (std::size_t d = 0; d < divisors.size(); ++d) {
        const Divisor divisor(divisors[d]);
        const avx2::Pair exact(divisor.value);
        // All of 2^23 for some, every eighth for the others.
        const std::uint32_t stride = d % 32 == 0 ? 16 : 128;
        const auto exponent = static_cast<std::uint32_t>(64 + random_word() % 96) << 23;
        std::uint32_t wrong = 0;
        for (std::uint32_t mantissa = 0; mantissa < 1U << 23; mantissa += stride) {
            alignas(32) std::uint32_t words[16];
            const std::uint32_t first = exponent + mantissa + (stride == 16 ? 0 : random_word() % 112U);
            for (std::uint32_t i = 0; i < 16; ++i) words[i] = first + i;
            const auto* floats = reinterpret_cast<const float*>(words);
            const avx2::Pair x(avx2::Vec(_mm256_load_ps(floats)), avx2::Vec(_mm256_load_ps(floats + 8)));
            const avx2::Pair a = quotient(x, divisor), b = x / exact;
            const __m256 same = _mm256_and_ps(_mm256_cmp_ps(a.even.value, b.even.value, _CMP_EQ_OQ),
                                              _mm256_cmp_ps(a.odd.value, b.odd.value, _CMP_EQ_OQ));
            if (_mm256_movemask_ps(same) != 0xff) wrong = first;
        }
        expect(wrong == 0, "quotient near", wrong);
    }
}
#else
void check_quotients() {}
#endif

}  // namespace

int main() {
    check_halves();
    check_stochastic();
    check_remainders();
    check_codes<true>();
    check_codes<false>();
    check_random_bits();
    check_quotients();
    return tally.report();
}
