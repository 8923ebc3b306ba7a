// Every CPU loop, once. A target instantiates them for its Vec; whatever does not fill a vector is one partial vector.
//
// Nothing here may be a function that another file could share: an inline function compiled with this target's flags
// must never be the copy that the linker keeps for all. So: templates over the target's Vec, no standard library.
#pragma once

#include <cstdint>

#include "../backend.h"

namespace lit_fast::cpu {

// Bytes ahead of the loads of a step: the machine cannot look past two or three iterations with a division and a root
// in each. Measured on Zen 3, two threads, float32: none 55.8, 256 58.2, 512 59.5, 1024 57.6, 2048 55.3 GB/s.
constexpr int kPrefetchBytes = 512;

template <class Formula, Fused kFused, bool kStateless, class V, class P, class S>
LIT_FAST_INLINE void step_range(const typename Formula::Coefficients& c, const GradientScale& scale, P* param,
                                const P* grad, S* const* state, std::int64_t begin, std::int64_t end) {
    constexpr int kStates = kStateless ? 0 : Formula::states;
    constexpr std::int64_t kParamAhead = kPrefetchBytes / static_cast<int>(sizeof(P));
    constexpr std::int64_t kStateAhead = kPrefetchBytes / static_cast<int>(sizeof(S));
    std::int64_t i = begin;
    for (; i + V::lanes <= end; i += V::lanes) {
        V::prefetch(param + i + kParamAhead);
        V::prefetch(grad + i + kParamAhead);
        V p = V::load(param + i);
        const V g = scaled_gradient(scale, V::load(grad + i));
        V s[Formula::states];
        for (int k = 0; k < kStates; ++k) {
            V::prefetch(state[k] + i + kStateAhead);
            s[k] = V::load(state[k] + i);
        }
        Formula::template update<kFused>(c, p, g, s);
        for (int k = 0; k < kStates; ++k) store(state[k] + i, s[k]);
        store(param + i, p);
    }
    if (i < end) {
        const int n = static_cast<int>(end - i);
        V p = V::load_first(param + i, n);
        const V g = scaled_gradient(scale, V::load_first(grad + i, n));
        V s[Formula::states];
        for (int k = 0; k < kStates; ++k) s[k] = V::load_first(state[k] + i, n);
        Formula::template update<kFused>(c, p, g, s);
        for (int k = 0; k < kStates; ++k) store_first(state[k] + i, s[k], n);
        store_first(param + i, p, n);
    }
}

// The body, then torch's remainder with its own order of operations.
template <class Formula, bool kStateless, class V, class P, class S>
void step_split(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at, std::int64_t begin,
                std::int64_t end) {
    // Local copies: a store through a vector pointer could otherwise change them, for all the compiler knows.
    const GradientScale scale = scale_at;
    typename Formula::Coefficients c;
    __builtin_memcpy(&c, block.bytes, sizeof(c));
    P* param = static_cast<P*>(task.param);
    const P* grad = static_cast<const P*>(task.grad);
    S* state[kMaxStates] = {static_cast<S*>(task.state[0]), static_cast<S*>(task.state[1])};
    const std::int64_t split = end < task.body ? end : (begin < task.body ? task.body : begin);
    step_range<Formula, Fused::second_product, kStateless, V>(c, scale, param, grad, state, begin, split);
    if (split < end) {
        step_range<Formula, Fused::first_product, kStateless, V>(c, scale, param, grad, state, split, end);
    }
}

template <class Formula, class V, class P, class S>
void step(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale, std::int64_t begin,
          std::int64_t end) {
    if (task.stateless) {
        step_split<Formula, true, V, P, S>(task, block, scale, begin, end);
    } else {
        step_split<Formula, false, V, P, S>(task, block, scale, begin, end);
    }
}

template <class V, class Wide, int part = 0>
LIT_FAST_INLINE void add_squares(Wide* sums, V x) {
    add_square(sums[part], x.template widen<part>());
    if constexpr ((part + 1) * Wide::lanes < V::lanes) add_squares<V, Wide, part + 1>(sums, x);
}

template <class V, class Wide, class T>
double sum_of_squares(const void* values, std::int64_t count) {
    constexpr int kParts = V::lanes / Wide::lanes;
    constexpr int kVectors = kSquareLanes / V::lanes;  // vectors that fill all lanes once
    const T* x = static_cast<const T*>(values);
    Wide sums[kSquareLanes / Wide::lanes];
    const std::int64_t stream = count / (kSquareStreams * kSquareLanes) * kSquareLanes;
    for (std::int64_t i = 0; i < stream; i += kSquareLanes) {
        for (int s = 0; s < kSquareStreams; ++s) {
            const T* at = x + s * stream + i;
            for (int k = 0; k < kVectors; ++k) add_squares<V>(sums + k * kParts, V::load(at + k * V::lanes));
        }
    }
    int k = 0;
    for (std::int64_t i = kSquareStreams * stream; i < count; i += V::lanes) {
        const std::int64_t left = count - i;
        const V v = left >= V::lanes ? V::load(x + i) : V::load_first(x + i, static_cast<int>(left));
        add_squares<V>(sums + k * kParts, v);
        k = (k + 1) % kVectors;
    }
    double lanes[kSquareLanes];
    for (int k = 0; k < kSquareLanes / Wide::lanes; ++k) sums[k].store(lanes + k * Wide::lanes);
    return add_lanes(lanes);
}

template <class V, class T>
void scale(void* values, const GradientScale& scale_at, std::int64_t count) {
    const GradientScale s = scale_at;
    T* x = static_cast<T*>(values);
    std::int64_t i = 0;
    for (; i + V::lanes <= count; i += V::lanes) store(x + i, scaled_gradient(s, V::load(x + i)));
    if (i < count) {
        const int n = static_cast<int>(count - i);
        store_first(x + i, scaled_gradient(s, V::load_first(x + i, n)), n);
    }
}

}  // namespace lit_fast::cpu
