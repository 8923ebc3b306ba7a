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
//
// All are correctly rounded (IEEE 754, to nearest even) and the compiler may contract nothing (-ffp-contract=off,
// --fmad=false), so that one formula gives the same bits on every target. A NaN is a NaN everywhere; its sign and
// payload are the machine's.
#pragma once

#include <cstdint>

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

}  // namespace lit_fast
