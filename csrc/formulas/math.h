// The vocabulary that every formula is written in.
//
// A formula is a template over V, a pack of float32 lanes: one lane for the scalar reference and for a CUDA thread,
// eight for AVX2, sixteen for AVX-512, four for NEON. V supplies
//
//     V(float)            the same value in every lane
//     a + b  a - b  a * b  a / b
//     fma(a, b, c)        a * b + c with one rounding
//     sqrt(a)             correctly rounded
//     clamp(a, lo, hi)    NaN stays NaN, as in torch.clamp
//     max(a, b)           NaN where either is, as in torch.maximum
//     sign(a)             -1, 0 or 1; NaN stays NaN, unlike in torch.sign, so that it is seen
//
// All are correctly rounded (IEEE 754, to nearest even) and the compiler may contract nothing (-ffp-contract=off,
// --fmad=false), so that one formula gives the same bits on every target. A NaN is a NaN everywhere; its sign and
// payload are the machine's.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define LIT_FAST_INLINE __host__ __device__ __forceinline__
#else
#define LIT_FAST_INLINE inline __attribute__((always_inline))
#endif

namespace lit_fast {

// torch's own kernels are plain C++ that its compiler contracts: in a*b + c*d it keeps one product exact inside an FMA,
// the second one in the vector loop and the first one in the scalar loop over the last (numel mod width) elements.
// Observed in torch 2.13's x86-64 wheel by comparing bits; formulas take it as a template argument.
enum class Fused { second_product, first_product };

template <Fused kFused, class V>
LIT_FAST_INLINE V sum_of_products(V a, V b, V c, V d) {
    if constexpr (kFused == Fused::second_product) {
        return fma(c, d, a * b);
    } else {
        return fma(a, b, c * d);
    }
}

// What a loop is compiled for: the states that there are (bit k: state k) and, with kGeneral, everything else that the
// options may ask for, decided at run time by branches that are the same for all elements. A form without it leaves
// them out: they cost a loop in registers and instructions a third of its time where instructions are the limit.
constexpr unsigned kGeneral = 0x100;
constexpr unsigned kSetOfForm = 0xff;

LIT_FAST_INLINE constexpr bool uses(unsigned form, int state) { return (form >> state & 1U) != 0; }

// Whether a formula's coefficients depend on norms of the whole tensor: it then has `direction` and `with_squares`, and
// a step begins with a pass that sums squares (cpu/measure.h, cuda/measure.cuh).
template <class Formula, class = void>
constexpr bool kMeasured = false;
template <class Formula>
constexpr bool kMeasured<Formula, std::void_t<decltype(&Formula::with_squares)>> = true;

// A divisor that many values share, with its inverse, both rounded to nearest.
struct Divisor {
    float value = 1.0F;
    float inverse = 1.0F;
    Divisor() = default;
    LIT_FAST_INLINE explicit Divisor(double x) : value(static_cast<float>(x)), inverse(1.0F / value) {}
};

template <class V>
LIT_FAST_INLINE V quotient(V x, const Divisor& d) {
    return x / V(d.value);
}

}  // namespace lit_fast
