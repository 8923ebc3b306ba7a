// One CUDA thread as a vector of one lane. The _rn intrinsics are never contracted, so a thread computes what the
// scalar reference computes.
#pragma once

#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../formulas/storage.h"

namespace lit_fast::cuda {

struct Wide {
    double value;
};
__device__ __forceinline__ Wide fma(Wide a, Wide b, Wide c) { return {__fma_rn(a.value, b.value, c.value)}; }

struct Lane {
    float value;
    __device__ __forceinline__ Lane() : value(0.0F) {}
    __device__ __forceinline__ explicit Lane(float v) : value(v) {}
};
__device__ __forceinline__ Lane operator+(Lane a, Lane b) { return Lane(__fadd_rn(a.value, b.value)); }
__device__ __forceinline__ Lane operator-(Lane a, Lane b) { return Lane(__fsub_rn(a.value, b.value)); }
__device__ __forceinline__ Lane operator*(Lane a, Lane b) { return Lane(__fmul_rn(a.value, b.value)); }
__device__ __forceinline__ Lane operator/(Lane a, Lane b) { return Lane(__fdiv_rn(a.value, b.value)); }
__device__ __forceinline__ Lane fma(Lane a, Lane b, Lane c) { return Lane(__fmaf_rn(a.value, b.value, c.value)); }
__device__ __forceinline__ Lane sqrt(Lane a) { return Lane(__fsqrt_rn(a.value)); }
__device__ __forceinline__ Lane max(Lane a, Lane b) { return a.value != a.value || a.value > b.value ? a : b; }
__device__ __forceinline__ Lane sign(Lane a) { return Lane(a.value > 0.0F ? 1.0F : a.value < 0.0F ? -1.0F : a.value); }
__device__ __forceinline__ Lane clamp(Lane a, Lane low, Lane high) {
    const float raised = a.value < low.value ? low.value : a.value;
    return Lane(raised > high.value ? high.value : raised);
}

__device__ __forceinline__ Lane load(const float& x) { return Lane(x); }
__device__ __forceinline__ Lane load(const bf16& x) { return Lane(widen(x)); }
__device__ __forceinline__ Lane load(const f16& x) { return Lane(widen(x)); }
__device__ __forceinline__ void store(float& x, Lane a) { x = a.value; }
__device__ __forceinline__ void store(bf16& x, Lane a) { x = nearest_bf16(a.value); }
__device__ __forceinline__ void store(f16& x, Lane a) { x = nearest_f16(a.value); }

// Neighbouring elements that one thread moves in one access of 128 or 64 bits. The address must be a multiple of the
// pack's size. Through CUDA's vector types: a pack copied as such may be taken apart into its elements.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T values[kCount];
};

template <class T, int kCount>
using PackWords = std::conditional_t<sizeof(T) * kCount == 16, uint4, uint2>;

template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> read_pack(const T* p) {
    const PackWords<T, kCount> words = *reinterpret_cast<const PackWords<T, kCount>*>(p);
    static_assert(sizeof(words) == sizeof(T) * kCount);
    Pack<T, kCount> pack;
    memcpy(&pack, &words, sizeof(pack));
    return pack;
}
// An instruction by name: nvcc 13.0 takes the store of a vector that was put together from elements apart into theirs.
__device__ __forceinline__ void write_words(void* p, const uint4& words) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
#else
    *static_cast<uint4*>(p) = words;
#endif
}
__device__ __forceinline__ void write_words(void* p, const uint2& words) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y)
                 : "memory");
#else
    *static_cast<uint2*>(p) = words;
#endif
}
template <class T, int kCount>
__device__ __forceinline__ void write_pack(T* p, const Pack<T, kCount>& pack) {
    PackWords<T, kCount> words;
    memcpy(&words, &pack, sizeof(words));
    write_words(p, words);
}

// An address that came from a table, of global memory: the compiler cannot know and would look every time.
template <class T>
__device__ __forceinline__ T* global(void* address) {
    __builtin_assume(__isGlobal(address));
    return static_cast<T*>(address);
}

template <class T, int kCount>
__device__ __forceinline__ bool aligned(const T* p) {
    return reinterpret_cast<unsigned long long>(p) % sizeof(Pack<T, kCount>) == 0;
}

}  // namespace lit_fast::cuda
