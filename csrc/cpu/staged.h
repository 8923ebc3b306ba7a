// A step whose tensors are stored in any of the ways that dtypes.h names, a block at a time: widened to float32 in the
// first-level cache, stepped there by the same loop as float32 tensors, narrowed again. Memory is read and written once
// as in a kernel of its own; a block costs some 30 instructions more for eight elements.
//
// The loops over a block are plain C++ over element functions of formulas/storage.h: this target's flags make vector
// code of them.
#pragma once

#include "../formulas/storage.h"
#include "loops.h"

namespace lit_fast::cpu {

constexpr int kBlock = kCodeBlock;

// Once for all formulas of a target, and never shared with another target's file.
#define LIT_FAST_OWN static __attribute__((noinline))

template <class T>
LIT_FAST_INLINE void widen_block(float* __restrict out, const T* __restrict in, int n) {
    for (int i = 0; i < n; ++i) out[i] = widen(in[i]);
}

LIT_FAST_INLINE void widen_block(float* out, const void* in, Dtype dtype, std::int64_t at, int n) {
    switch (dtype) {
        case Dtype::float32:
            return widen_block(out, static_cast<const float*>(in) + at, n);
        case Dtype::bfloat16:
            return widen_block(out, static_cast<const bf16*>(in) + at, n);
        case Dtype::float16:
            return widen_block(out, static_cast<const f16*>(in) + at, n);
        default:
            return;
    }
}

LIT_FAST_INLINE void narrow_block(float* __restrict out, const float* __restrict in, int n) {
    for (int i = 0; i < n; ++i) out[i] = in[i];
}
LIT_FAST_INLINE void narrow_block(bf16* __restrict out, const float* __restrict in, int n) {
    for (int i = 0; i < n; ++i) out[i] = nearest_bf16(in[i]);
}
LIT_FAST_INLINE void narrow_block(f16* __restrict out, const float* __restrict in, int n) {
    for (int i = 0; i < n; ++i) out[i] = nearest_f16(in[i]);
}
LIT_FAST_INLINE void random_block(std::uint32_t* __restrict out, std::uint32_t index, RandomKey key, int n) {
    for (int i = 0; i < n; ++i) out[i] = random_bits(index + static_cast<std::uint32_t>(i), key);
}
LIT_FAST_INLINE void narrow_param(bf16* __restrict out, const float* __restrict in, int n,
                                  const std::uint32_t* __restrict random) {
    for (int i = 0; i < n; ++i) out[i] = stochastic_bf16(in[i], param_bits(random[i]));
}
template <int k>
LIT_FAST_INLINE void narrow_state(bf16* __restrict out, const float* __restrict in, int n,
                                  const std::uint32_t* __restrict random) {
    for (int i = 0; i < n; ++i) out[i] = stochastic_bf16(in[i], state_bits(random[i], k) >> 4);
}

LIT_FAST_INLINE void rebuild_block(float* __restrict out, const bf16* __restrict upper,
                                   const std::int16_t* __restrict remainder, int n) {
    for (int i = 0; i < n; ++i) out[i] = rebuilt(upper[i], remainder[i]);
}
LIT_FAST_INLINE void split_block(bf16* __restrict upper, std::int16_t* __restrict remainder, const float* __restrict in,
                                 int n) {
    for (int i = 0; i < n; ++i) {
        upper[i] = upper_half(in[i]);
        remainder[i] = remainder_of(in[i]);
    }
}

template <bool kSigned>
LIT_FAST_INLINE void decode_block(float* __restrict out, const std::uint8_t* __restrict codes, float scale, int n) {
    bf16 units[kBlock];
    for (int i = 0; i < n; ++i) units[i] = kSigned ? units_signed(codes[i]) : units_unsigned(codes[i]);
    for (int i = 0; i < n; ++i) out[i] = widen(units[i]) * scale;
}
template <bool kSigned, int k>
LIT_FAST_INLINE float encode_block(std::uint8_t* __restrict codes, const float* __restrict in, int n,
                                   const std::uint32_t* __restrict random) {
    std::int32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const auto magnitude = static_cast<std::int32_t>(bits_of(in[i]) & 0x7fffffffU);
        largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = scale_of(static_cast<std::uint32_t>(largest)), inverse = inverse_scale(scale);
    for (int i = 0; i < n; ++i) {
        const std::uint32_t chance = state_bits(random[i], k);
        codes[i] = kSigned ? encoded_signed(in[i], inverse, chance) : encoded_unsigned(in[i], inverse, chance);
    }
    return scale;
}

// A block ahead: what the next round of the loop will read or write.
LIT_FAST_INLINE void prefetch_block(const void* array, std::int64_t element, std::int64_t at) {
    const auto* bytes = static_cast<const char*>(array) + (at + kBlock) * element;
    for (std::int64_t i = 0; i < kBlock * element; i += 64) __builtin_prefetch(bytes + i);
}

// Storage and addresses of one task, as local variables.
struct Staged {
    Storage storage;
    void* param;
    void* master;
    const void* grad;
    void* state[kMaxStates];
    float* code_scale[kMaxStates];
    std::uint64_t seed, step, first_index;
    std::uint32_t random[kBlock];  // of the block at hand, where there is anything to round with it

    LIT_FAST_INLINE explicit Staged(const StepTask& task)
        : param(task.param),
          master(task.master),
          grad(task.grad),
          seed(task.seed),
          step(task.step_number),
          first_index(task.first_index) {
        __builtin_memcpy(&storage, &task.storage, sizeof(Storage));
        for (int k = 0; k < kMaxStates; ++k) {
            state[k] = task.state[k];
            code_scale[k] = task.code_scale[k];
        }
    }
};

LIT_FAST_OWN void load_param(const Staged& t, float* out, std::int64_t at, int n) {
    if (t.storage.master == Master::float32) {
        widen_block(out, static_cast<const float*>(t.master) + at, n);
    } else if (t.storage.master == Master::remainder) {
        rebuild_block(out, static_cast<const bf16*>(t.param) + at, static_cast<const std::int16_t*>(t.master) + at, n);
    } else {
        widen_block(out, t.param, t.storage.param, at, n);
    }
}

LIT_FAST_OWN void store_param(const Staged& t, const float* in, std::int64_t at, int n) {
    if (t.storage.master == Master::remainder) {
        return split_block(static_cast<bf16*>(t.param) + at, static_cast<std::int16_t*>(t.master) + at, in, n);
    }
    if (t.storage.master == Master::float32) narrow_block(static_cast<float*>(t.master) + at, in, n);
    if (t.storage.param == Dtype::float32) {
        narrow_block(static_cast<float*>(t.param) + at, in, n);
    } else if (t.storage.param == Dtype::float16) {
        narrow_block(static_cast<f16*>(t.param) + at, in, n);
    } else if (t.storage.stochastic && t.storage.master == Master::none) {
        narrow_param(static_cast<bf16*>(t.param) + at, in, n, t.random);
    } else {
        narrow_block(static_cast<bf16*>(t.param) + at, in, n);
    }
}

template <bool kSigned>
LIT_FAST_OWN void load_state(const Staged& t, int k, float* out, std::int64_t at, int n) {
    if (t.storage.state != Dtype::uint8) return widen_block(out, t.state[k], t.storage.state, at, n);
    const auto* codes = static_cast<const std::uint8_t*>(t.state[k]) + at;
    decode_block<kSigned>(out, codes, t.code_scale[k][at / kBlock], n);
}

template <bool kSigned, int k>
LIT_FAST_OWN void store_state(const Staged& t, const float* in, std::int64_t at, int n) {
    if (t.storage.state == Dtype::uint8) {
        auto* codes = static_cast<std::uint8_t*>(t.state[k]) + at;
        t.code_scale[k][at / kBlock] = encode_block<kSigned, k>(codes, in, n, t.random);
    } else if (t.storage.state == Dtype::float32) {
        narrow_block(static_cast<float*>(t.state[k]) + at, in, n);
    } else if (t.storage.state == Dtype::float16) {
        narrow_block(static_cast<f16*>(t.state[k]) + at, in, n);
    } else if (t.storage.stochastic) {
        narrow_state<k>(static_cast<bf16*>(t.state[k]) + at, in, n, t.random);
    } else {
        narrow_block(static_cast<bf16*>(t.state[k]) + at, in, n);
    }
}

template <class Formula, unsigned kForm, int k = 0>
LIT_FAST_INLINE void load_states(const Staged& t, float (*values)[kBlock], std::int64_t at, int n) {
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) load_state<uses(Formula::signed_states, k)>(t, k, values[k], at, n);
        load_states<Formula, kForm, k + 1>(t, values, at, n);
    }
}
template <class Formula, unsigned kForm, int k = 0>
LIT_FAST_INLINE void store_states(const Staged& t, const float (*values)[kBlock], std::int64_t at, int n) {
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) store_state<uses(Formula::signed_states, k), k>(t, values[k], at, n);
        store_states<Formula, kForm, k + 1>(t, values, at, n);
    }
}

// begin is a multiple of kBlock.
template <class Formula, class V>
void step_staged(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at, std::int64_t begin,
                 std::int64_t end) {
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    const GradientScale scale = signed_scale(scale_at, c);
    Staged t(task);
    const bool random = t.storage.stochastic || t.storage.state == Dtype::uint8;
    alignas(64) float param[kBlock], grad[kBlock], values[Formula::states][kBlock];
    Tensors<float, float, float> tensors(param, grad);
    for (int k = 0; k < Formula::states; ++k) tensors.state[k] = values[k];
    for_form<Formula>(clamps(scale) ? task.form | kGeneral : task.form, [&](auto form) {
        for (std::int64_t at = begin; at < end; at += kBlock) {
            const int n = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
            prefetch_block(t.param, bytes_of(t.storage.param), at);
            prefetch_block(t.grad, bytes_of(t.storage.grad), at);
            if (t.master != nullptr) prefetch_block(t.master, t.storage.master == Master::float32 ? 4 : 2, at);
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(form.value, k)) prefetch_block(t.state[k], bytes_of(t.storage.state), at);
            }
            load_param(t, param, at, n);
            widen_block(grad, t.grad, t.storage.grad, at, n);
            load_states<Formula, form.value>(t, values, at, n);
            if (random) {
                const std::uint64_t index = t.first_index + static_cast<std::uint64_t>(at);
                random_block(t.random, static_cast<std::uint32_t>(index), random_key(t.seed, t.step, index), n);
            }
            const std::int64_t body = task.body - at < n ? (task.body > at ? task.body - at : 0) : n;
            step_range<Formula, Fused::second_product, form.value, false, V>(c, scale, tensors, 0, body);
            if (body < n) step_range<Formula, Fused::first_product, form.value, false, V>(c, scale, tensors, body, n);
            store_states<Formula, form.value>(t, values, at, n);
            store_param(t, param, at, n);
        }
    });
}

// Scale and clip in place, for dtypes without a vector type of their own.
template <class V, class T>
void scale_staged(void* values, const GradientScale& scale_at, std::int64_t count) {
    auto* x = static_cast<T*>(values);
    alignas(64) float block[kBlock];
    for (std::int64_t at = 0; at < count; at += kBlock) {
        const int n = count - at < kBlock ? static_cast<int>(count - at) : kBlock;
        widen_block(block, x + at, n);
        scale<V, float>(block, scale_at, n);
        narrow_block(x + at, block, n);
    }
}

}  // namespace lit_fast::cpu
