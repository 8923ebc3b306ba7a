// What one launch works on, passed by value in the kernel's arguments: it needs no upload, no pinned buffer whose
// lifetime could end too early, and is captured whole by a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../formulas/all.h"
#include "../formulas/scale.h"

namespace lit_fast::cuda {

// Kernel arguments may take 32,764 bytes from CUDA 12.1 on, 4,096 before.
#if CUDART_VERSION >= 12010
constexpr int kMaxTensors = 320;
constexpr int kMaxCoefficients = 64;
constexpr int kMaxCounters = 2048;
#else
constexpr int kMaxTensors = 40;
constexpr int kMaxCoefficients = 16;
constexpr int kMaxCounters = 448;
#endif

// One block of threads takes one chunk. 32 Ki elements: 64 to 128 accesses of 128 bits in flight a thread's lifetime,
// and thousands of blocks in a model.
constexpr int kThreads = 256;
constexpr std::int64_t kChunk = 1 << 15;

struct TensorEntry {
    void* param;
    const void* grad;
    void* state[kMaxStates];
    const float* step;  // on the device, or nullptr: then the coefficients are ready
    std::int64_t numel;
    std::int32_t first_chunk;  // of this launch
    std::int32_t coefficients;
};

// Either a formula's coefficients or, with the step on the device, its options.
union CoefficientEntry {
    CoefficientBlock block;
    double options[kMaxOptions];
};

struct StepTable {
    TensorEntry tensors[kMaxTensors];
    CoefficientEntry coefficients[kMaxCoefficients];
    std::int32_t tensor_count;
};

struct GradTable {
    struct Entry {
        void* data;
        std::int64_t numel;
        std::int32_t first_chunk;
    } tensors[kMaxTensors];
    std::int32_t tensor_count;
};

struct CounterTable {
    float* counters[kMaxCounters - 1];
    std::int32_t count;
};

// GradientScale before the norm is known on the host.
struct DeviceScale {
    float scale;
    float max_norm;  // negative: no clipping by norm
    float limit;
    const float* norm;  // on the device, of the scaled gradients
};

#if CUDART_VERSION >= 12010
static_assert(sizeof(StepTable) + sizeof(DeviceScale) <= 32764);
#else
static_assert(sizeof(StepTable) + sizeof(DeviceScale) <= 4096);
#endif

}  // namespace lit_fast::cuda
