// Element types and the layouts (which of them stands where) that the kernels know.
#pragma once

#include <cstdint>

namespace lit_fast {

enum class Dtype : std::int32_t { float32 = 0, bfloat16 = 1, other = 2 };
constexpr int kDtypeCount = 2;  // those with kernels

struct bf16 {
    std::uint16_t bits;
};

constexpr std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// (parameter and gradient, optimizer state). Arithmetic is float32 in all of them.
enum class Layout : std::int32_t { float32 = 0, bfloat16 = 1, float32_bfloat16_state = 2 };
constexpr int kLayoutCount = 3;

// The index of the layout, or -1 where there is no kernel.
constexpr int layout_of(Dtype param, Dtype grad, Dtype state) {
    if (param != grad) return -1;
    if (param == Dtype::float32 && state == Dtype::float32) return static_cast<int>(Layout::float32);
    if (param == Dtype::bfloat16 && state == Dtype::bfloat16) return static_cast<int>(Layout::bfloat16);
    if (param == Dtype::float32 && state == Dtype::bfloat16) {
        return static_cast<int>(Layout::float32_bfloat16_state);
    }
    return -1;
}

}  // namespace lit_fast
