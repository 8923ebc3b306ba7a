// A tensor as the kernels see it: where it is, how long it is, what it holds. It owns nothing.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "formulas/all.h"

namespace lit_fast {

struct Span {
    void* data = nullptr;
    std::int64_t numel = 0;
    Dtype dtype = Dtype::other;
};

// One parameter's step. All arrays have numel elements and the same strides, but for the scales of 8-bit codes.
struct StepTask {
    void* param = nullptr;
    const void* grad = nullptr;
    void* state[kMaxStates] = {};
    float* code_scale[kMaxStates] = {};  // of uint8 states: one for each kCodeBlock elements
    void* master = nullptr;              // float32 or int16, see Storage
    std::int64_t numel = 0;
    std::int64_t body = 0;           // elements before torch's remainder loop, see Fused in formulas/math.h
    std::uint64_t first_index = 0;   // global index of element 0 among all of the optimizer's elements
    std::uint64_t seed = 0;          // of stochastic rounding
    std::uint64_t step_number = 0;   // this step's, where the host knows it
    float* step = nullptr;           // the counter of steps, before this one, where only the device knows it
    std::int32_t coefficients = 0;   // index into the batch's coefficient blocks
    unsigned form = 0;               // see formulas/math.h
    Layout layout = Layout::staged;  // of storage
    Storage storage;
};

}  // namespace lit_fast
