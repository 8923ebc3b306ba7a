// Stands in for CUDA's headers where csrc/cuda/*.cu is compiled as ordinary C++: blocks run one after another, in every
// second launch from the last one to the first, the threads of a block in turns, each until it waits for the others.
// What it cannot show is what only a GPU has: memory ordering between blocks, streams, and speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#ifndef CUDART_VERSION
#define CUDART_VERSION 12000  // the small tables, which few tensors overflow
#endif
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __builtin_assume(condition)  // of address spaces
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x;
    explicit dim3(unsigned size = 0) : x(size) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// For programs that only count launches, of tensors that do not exist.
inline bool run_kernels = true;
inline int launches = 0;

// What makes the host wait for the device.
inline int waits = 0;
inline cudaError_t waited() {
    ++waits;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return waited(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return waited(); }
inline cudaError_t cudaEventSynchronize(void*) { return waited(); }
inline cudaError_t cudaMemcpy(void*, const void*, std::size_t, int) { return waited(); }
inline cudaError_t cudaMalloc(void**, std::size_t) { return waited(); }
inline cudaError_t cudaFree(void*) { return waited(); }

inline dim3 threadIdx, blockIdx;

// Who waits for whom: a thread runs until it waits, then the next one does.
enum class Waits { not_at_all, for_warp, for_block, for_ever };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Waits waits = Waits::not_at_all;
};
inline std::deque<Fiber> fibers;
inline ucontext_t scheduler;
inline void wait_for(Waits whom) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.waits = whom;
    swapcontext(&fiber.context, &scheduler);
}
inline void __syncthreads() { wait_for(Waits::for_block); }

inline unsigned warp_values[1024];
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    const unsigned first = threadIdx.x / 32 * 32;
    warp_values[threadIdx.x] = value;
    wait_for(Waits::for_warp);
    for (unsigned t = first; t < first + 32; ++t) value = warp_values[t] > value ? warp_values[t] : value;
    wait_for(Waits::for_warp);
    return value;
}

// Blocks run one after another: what one has written, the next one sees.
inline void __threadfence() {}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
    const unsigned long long before = *to;
    *to = before + value;
    return before;
}
inline double __ldcg(const double* from) { return *from; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
using std::memcpy;

template <class... Parameters, std::size_t... kIndex>
void call_kernel(void (*kernel)(Parameters...), void** arguments, std::index_sequence<kIndex...>) {
    kernel(*static_cast<Parameters*>(arguments[kIndex])...);
}

inline std::function<void()> kernel_body;
inline void run_fiber() {
    kernel_body();
    wait_for(Waits::for_ever);
}

// Lets those go on that wait for nobody but each other.
inline bool release(std::size_t begin, std::size_t end, Waits whom) {
    bool any = false;
    for (std::size_t t = begin; t < end; ++t) {
        if (fibers[t].waits != whom && fibers[t].waits != Waits::for_ever) return false;
        any = any || fibers[t].waits == whom;
    }
    for (std::size_t t = begin; any && t < end; ++t) {
        if (fibers[t].waits == whom) fibers[t].waits = Waits::not_at_all;
    }
    return any;
}

inline void run_block(unsigned size) {
    fibers.resize(size);
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(1 << 17);
        fiber.waits = Waits::not_at_all;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool more = true; more;) {
        for (unsigned t = 0; t < size; ++t) {
            if (fibers[t].waits != Waits::not_at_all) continue;
            threadIdx = dim3(t);
            swapcontext(&scheduler, &fibers[t].context);
        }
        more = false;
        for (unsigned t = 0; t < size; t += 32) more = release(t, t + 32, Waits::for_warp) || more;
        more = release(0, size, Waits::for_block) || more;
    }
    for (const Fiber& fiber : fibers) {
        if (fiber.waits != Waits::for_ever) std::abort();  // threads that wait for each other for ever
    }
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
    ++launches;
    if (!run_kernels) return cudaSuccess;
    kernel_body = [=] { call_kernel(kernel, arguments, std::index_sequence_for<Parameters...>()); };
    for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx = dim3(launches % 2 == 0 ? b : grid.x - 1 - b);
        run_block(block.x);
    }
    return cudaSuccess;
}
