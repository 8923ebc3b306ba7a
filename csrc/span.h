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

// One parameter's step. All arrays have numel elements and the same strides.
struct StepTask {
    void* param = nullptr;
    const void* grad = nullptr;
    void* state[kMaxStates] = {};
    std::int64_t numel = 0;
    std::int64_t body = 0;          // elements before torch's remainder loop, see Fused in formulas/math.h
    std::int32_t coefficients = 0;  // index into the batch's coefficient blocks
    std::int32_t layout = 0;        // Layout
    bool stateless = false;
    const float* step = nullptr;  // this step's number where only the device knows it
};

}  // namespace lit_fast
