// Element types, and the ways in which the tensors of one step may be stored.
#pragma once

#include <cstdint>

namespace lit_fast {

enum class Dtype : std::int32_t {
    float32 = 0,
    bfloat16 = 1,
    float16 = 2,
    uint8 = 3,
    int16 = 4,
    float64 = 5,
    other = 6
};
constexpr int kDtypeCount = 3;  // those of parameters and gradients

struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

constexpr std::int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::float32 ? 4 : dtype == Dtype::float64 ? 8 : dtype == Dtype::uint8 ? 1 : 2;
}

// What a 16-bit parameter has beside it so that its value is known in float32.
enum class Master : std::int32_t { none = 0, float32 = 1, remainder = 2 };

struct Storage {
    Dtype param = Dtype::float32;
    Dtype grad = Dtype::float32;
    Dtype state = Dtype::float32;  // uint8: codes with a scale a block, see formulas/storage.h
    Master master = Master::none;
    bool stochastic = false;  // how bfloat16 parameters and states are rounded
};

// Those with kernels of their own, which convert in registers: (parameter and gradient, optimizer state); two with a
// float32 master of a bfloat16 parameter (gradient; state float32); and 8-bit codes beside float32 or bfloat16, with
// either rounding. Arithmetic is float32 in all of them. Everything else goes through a block of float32 in the
// first-level cache (cpu/staged.h).
enum class Layout : std::int32_t {
    float32 = 0,
    bfloat16 = 1,
    float32_bfloat16_state = 2,
    bfloat16_master = 3,
    bfloat16_master_float32_grad = 4,
    codes = 5,
    staged = 6
};
constexpr int kLayoutCount = 7;

// stateless: nothing is stored in s.state.
constexpr Layout layout_of(const Storage& s, bool stateless) {
    const bool float32_state = stateless || s.state == Dtype::float32;
    const bool bfloat16_state = stateless || s.state == Dtype::bfloat16;
    if (s.master == Master::float32 && s.param == Dtype::bfloat16 && float32_state) {
        if (s.grad == Dtype::bfloat16) return Layout::bfloat16_master;
        if (s.grad == Dtype::float32) return Layout::bfloat16_master_float32_grad;
    }
    const bool plain = s.param == s.grad && s.master == Master::none;
    if (plain && s.param != Dtype::float16 && s.state == Dtype::uint8 && !stateless) return Layout::codes;
    if (s.param != s.grad || s.master != Master::none || s.stochastic) return Layout::staged;
    if (s.param == Dtype::float32 && float32_state) return Layout::float32;
    if (s.param == Dtype::bfloat16 && bfloat16_state) return Layout::bfloat16;
    if (s.param == Dtype::float32 && bfloat16_state) return Layout::float32_bfloat16_state;
    return Layout::staged;
}

// Why there is no such step, or nullptr.
constexpr const char* impossible(const Storage& s) {
    const bool half = s.param == Dtype::bfloat16 || s.param == Dtype::float16;
    if (s.param != Dtype::float32 && !half) return "its parameter is neither float32, bfloat16 nor float16";
    if (s.grad != s.param && s.grad != Dtype::float32) return "its gradient is neither float32 nor of its own dtype";
    if (s.state != Dtype::float32 && s.state != Dtype::uint8 && s.state != Dtype::bfloat16 && s.state != s.param) {
        return "its state is neither float32, bfloat16, uint8 (8-bit codes) nor of its own dtype";
    }
    if (s.master != Master::none && !half)
        return "it is float32 and has a master weight, which is for 16-bit parameters";
    if (s.master == Master::remainder && s.param != Dtype::bfloat16) {
        return "it has a 16-bit remainder and is not bfloat16: only bfloat16 is the upper half of a float32";
    }
    return nullptr;
}

}  // namespace lit_fast
