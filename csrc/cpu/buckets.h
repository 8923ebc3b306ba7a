// Loops over flat memory: packing gradients with scale and cast, and sums over what several ranks sent. float32 and
// bfloat16 convert in registers; float16, for which not every target has an instruction, a block at a time.
#pragma once

#include "staged.h"

namespace lit_fast::cpu {

template <class T>
constexpr bool kInRegisters = std::is_same_v<T, float> || std::is_same_v<T, bf16>;

// a + b as a tensor of T holds it.
template <class T, class V>
LIT_FAST_INLINE V sum_in(V a, V b) {
    if constexpr (std::is_same_v<T, float>) {
        return a + b;
    } else {
        T rounded[V::lanes];
        store(rounded, a + b);
        return V::load(rounded);
    }
}

template <bool kAside, class V, class In, class Out>
LIT_FAST_INLINE void pack_direct(const In* grad, const In* aside, Out* out, float scale_by, std::int64_t count) {
    const V scale(scale_by);
    std::int64_t i = 0;
    for (; i + V::lanes <= count; i += V::lanes) {
        V x = V::load(grad + i);
        if constexpr (kAside) x = sum_in<In>(V::load(aside + i), x);
        store(out + i, x * scale);
    }
    if (i < count) {
        const int n = static_cast<int>(count - i);
        V x = V::load_first(grad + i, n);
        if constexpr (kAside) x = sum_in<In>(V::load_first(aside + i, n), x);
        store_first(out + i, x * scale, n);
    }
}

template <class V, class In, class Out>
void pack(const void* grad_at, const void* aside_at, void* out_at, float scale_by, std::int64_t count) {
    const auto* grad = static_cast<const In*>(grad_at);
    const auto* aside = static_cast<const In*>(aside_at);
    auto* out = static_cast<Out*>(out_at);
    if constexpr (kInRegisters<In> && kInRegisters<Out>) {
        if (aside != nullptr) return pack_direct<true, V>(grad, aside, out, scale_by, count);
        return pack_direct<false, V>(grad, aside, out, scale_by, count);
    } else {
        alignas(64) float block[kBlock], other[kBlock];
        In rounded[kBlock];
        for (std::int64_t at = 0; at < count; at += kBlock) {
            const int n = count - at < kBlock ? static_cast<int>(count - at) : kBlock;
            widen_block(block, grad + at, n);
            if (aside != nullptr) {
                widen_block(other, aside + at, n);
                pack_direct<true, V>(block, other, block, 1.0F, n);
                narrow_block(rounded, block, n);
                widen_block(block, rounded, n);
            }
            pack_direct<false, V>(block, block, block, scale_by, n);
            narrow_block(out + at, block, n);
        }
    }
}

// In the order of the pieces, whatever their number: a sum that each rank computes alike.
template <class V, class In, class Out>
LIT_FAST_INLINE void sum_direct(const In* first, std::int64_t stride, std::int64_t pieces, Out* out, float scale_by,
                                std::int64_t count) {
    const V scale(scale_by);
    std::int64_t i = 0;
    for (; i + V::lanes <= count; i += V::lanes) {
        V sum = V::load(first + i);
        for (std::int64_t k = 1; k < pieces; ++k) sum = sum + V::load(first + k * stride + i);
        store(out + i, sum * scale);
    }
    if (i < count) {
        const int n = static_cast<int>(count - i);
        V sum = V::load_first(first + i, n);
        for (std::int64_t k = 1; k < pieces; ++k) sum = sum + V::load_first(first + k * stride + i, n);
        store_first(out + i, sum * scale, n);
    }
}

template <class V, class In, class Out>
void sum_pieces(const void* first_at, std::int64_t stride, std::int64_t pieces, void* out_at, float scale_by,
                std::int64_t count) {
    const auto* first = static_cast<const In*>(first_at);
    auto* out = static_cast<Out*>(out_at);
    if constexpr (kInRegisters<In> && kInRegisters<Out>) {
        sum_direct<V>(first, stride, pieces, out, scale_by, count);
    } else {
        alignas(64) float sum[kBlock], next[kBlock];
        for (std::int64_t at = 0; at < count; at += kBlock) {
            const int n = count - at < kBlock ? static_cast<int>(count - at) : kBlock;
            widen_block(sum, first + at, n);
            for (std::int64_t k = 1; k < pieces; ++k) {
                widen_block(next, first + k * stride + at, n);
                pack_direct<true, V>(next, sum, sum, 1.0F, n);
            }
            pack_direct<false, V>(sum, sum, sum, scale_by, n);
            narrow_block(out + at, sum, n);
        }
    }
}

}  // namespace lit_fast::cpu
