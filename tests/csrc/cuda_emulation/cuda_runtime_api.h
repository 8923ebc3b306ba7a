// Stands in for CUDA's headers where csrc/cuda/*.cu is compiled as ordinary C++: blocks run one after another, the
// threads of a block are threads of the system, __syncthreads is a barrier. What it cannot show is what only a GPU
// has: memory ordering between blocks, streams, and speed.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define CUDART_VERSION 12000  // the small tables, which few tensors overflow
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
    unsigned x;
    explicit dim3(unsigned size = 0) : x(size) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline thread_local dim3 threadIdx, blockIdx;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

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

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
    std::barrier<> barrier(static_cast<std::ptrdiff_t>(block.x));
    block_barrier = &barrier;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < block.x; ++t) {
        threads.emplace_back([=, &barrier] {
            threadIdx = dim3(t);
            for (unsigned b = 0; b < grid.x; ++b) {
                blockIdx = dim3(b);
                call_kernel(kernel, arguments, std::index_sequence_for<Parameters...>());
                barrier.arrive_and_wait();  // shared memory belongs to one block at a time
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    return cudaSuccess;
}
