// Every CPU loop, once. A target instantiates them for its Vec; whatever does not fill a vector is one partial vector.
//
// Nothing here may be a function that another file could share: an inline function compiled with this target's flags
// must never be the copy that the linker keeps for all. So: templates over the target's Vec, nothing of the standard
// library but types.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../backend.h"
#include "../formulas/storage.h"

namespace lit_fast::cpu {

// Bytes ahead of the loads of a step: the machine cannot look past two or three iterations with a division and a root
// in each. Measured on Zen 3, two threads, float32: none 55.8, 256 58.2, 512 59.5, 1024 57.6, 2048 55.3 GB/s.
constexpr int kPrefetchBytes = 512;

// A Vec with numbers_only stores no NaN and may make one of an infinite value on the way: vectors in which one turns up
// are stepped again, in the way that takes all values.
//
// The loop below in a function of its own, which takes no registers from the loop that calls it now and then.
template <class Formula, Fused kFused, unsigned kForm, class V, class P, class S>
__attribute__((noinline, cold)) void step_aside(const typename Formula::Coefficients& c, const GradientScale& scale,
                                                P* param, const P* grad, S* const* state, std::int64_t begin,
                                                std::int64_t end);

// kForm: see formulas/math.h. kAhead: bytes of prefetch, 0 for what is in the cache already.
template <class Formula, Fused kFused, unsigned kForm, int kAhead, class V, class P, class S>
LIT_FAST_INLINE void step_range(const typename Formula::Coefficients& c, const GradientScale& scale, P* param,
                                const P* grad, S* const* state, std::int64_t begin, std::int64_t end) {
    constexpr bool kMayClamp = (kForm & kGeneral) != 0;
    constexpr std::int64_t kParamAhead = kAhead / static_cast<int>(sizeof(P));
    constexpr std::int64_t kStateAhead = kAhead / static_cast<int>(sizeof(S));
    std::int64_t i = begin;
    for (; i + V::lanes <= end; i += V::lanes) {
        if constexpr (kAhead != 0) {
            V::prefetch(param + i + kParamAhead);
            V::prefetch(grad + i + kParamAhead);
        }
        V p = V::load(param + i);
        const V g = scaled_gradient<kMayClamp>(scale, V::load(grad + i));
        V s[Formula::states];
        for (int k = 0; k < Formula::states; ++k) {
            if (!uses(kForm, k)) continue;
            if constexpr (kAhead != 0) V::prefetch(state[k] + i + kStateAhead);
            s[k] = V::load(state[k] + i);
        }
        Formula::template update<kFused, kForm>(c, p, g, s);
        if constexpr (V::numbers_only) {
            bool all_numbers = are_numbers(p);
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) all_numbers = all_numbers && are_numbers(s[k]);
            }
            if (__builtin_expect(!all_numbers, 0)) {
                step_aside<Formula, kFused, kForm, typename V::Half>(c, scale, param, grad, state, i, i + V::lanes);
                continue;
            }
        }
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) store(state[k] + i, s[k]);
        }
        store(param + i, p);
    }
    if constexpr (V::numbers_only) {
        if (i < end) step_aside<Formula, kFused, kForm, typename V::Half>(c, scale, param, grad, state, i, end);
    } else if (i < end) {
        const int n = static_cast<int>(end - i);
        V p = V::load_first(param + i, n);
        const V g = scaled_gradient<kMayClamp>(scale, V::load_first(grad + i, n));
        V s[Formula::states];
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) s[k] = V::load_first(state[k] + i, n);
        }
        Formula::template update<kFused, kForm>(c, p, g, s);
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) store_first(state[k] + i, s[k], n);
        }
        store_first(param + i, p, n);
    }
}

template <class Formula, Fused kFused, unsigned kForm, class V, class P, class S>
void step_aside(const typename Formula::Coefficients& c, const GradientScale& scale, P* param, const P* grad,
                S* const* state, std::int64_t begin, std::int64_t end) {
    step_range<Formula, kFused, kForm, 0, V>(c, scale, param, grad, state, begin, end);
}

// The body, then torch's remainder with its own order of operations.
template <class Formula, unsigned kForm, int kAhead, class V, class P, class S>
LIT_FAST_INLINE void step_split(const typename Formula::Coefficients& c, const GradientScale& scale, P* param,
                                const P* grad, S* const* state, std::int64_t begin, std::int64_t body,
                                std::int64_t end) {
    const std::int64_t split = end < body ? end : (begin < body ? body : begin);
    step_range<Formula, Fused::second_product, kForm, kAhead, V>(c, scale, param, grad, state, begin, split);
    if (split < end) {
        step_range<Formula, Fused::first_product, kForm, kAhead, V>(c, scale, param, grad, state, split, end);
    }
}

// Calls with_form(std::integral_constant<unsigned, form>) for the first of the formula's forms that does what is asked.
template <class Formula, int index = 0, class WithForm>
LIT_FAST_INLINE void for_form(unsigned form, const WithForm& with_form) {
    constexpr int kForms = static_cast<int>(sizeof(Formula::forms) / sizeof(Formula::forms[0]));
    if constexpr (index < kForms) {
        if (form == Formula::forms[index] || (form | kGeneral) == Formula::forms[index]) {
            with_form(std::integral_constant<unsigned, Formula::forms[index]>{});
        } else {
            for_form<Formula, index + 1>(form, with_form);
        }
    }
}

template <class Formula>
LIT_FAST_INLINE typename Formula::Coefficients coefficients_of(const CoefficientBlock& block) {
    typename Formula::Coefficients c;
    __builtin_memcpy(&c, block.bytes, sizeof(c));
    return c;
}

template <class Coefficients>
LIT_FAST_INLINE GradientScale signed_scale(const GradientScale& scale, const Coefficients& c) {
    GradientScale result = scale;
    result.scale *= c.gradient_sign;
    return result;
}

template <class Formula, class V, class P, class S>
void step(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at, std::int64_t begin,
          std::int64_t end) {
    // Local copies: a store through a vector pointer could otherwise change them, for all the compiler knows.
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    const GradientScale scale = signed_scale(scale_at, c);
    auto* param = static_cast<P*>(task.param);
    const auto* grad = static_cast<const P*>(task.grad);
    S* state[kMaxStates];
    for (int k = 0; k < kMaxStates; ++k) state[k] = static_cast<S*>(task.state[k]);
    const std::int64_t body = task.body;
    for_form<Formula>(clamps(scale) ? task.form | kGeneral : task.form, [&](auto form) {
        step_split<Formula, form.value, kPrefetchBytes, V>(c, scale, param, grad, state, begin, body, end);
    });
}

template <class V, class T>
LIT_FAST_INLINE V loaded(const T* p) {
    return V::load(p);
}
template <class V>
LIT_FAST_INLINE V loaded(const f16* p) {
    float values[V::lanes];
    for (int i = 0; i < V::lanes; ++i) values[i] = widen(p[i]);
    return V::load(values);
}
template <class V, class T>
LIT_FAST_INLINE V loaded_first(const T* p, int n) {
    return V::load_first(p, n);
}
template <class V>
LIT_FAST_INLINE V loaded_first(const f16* p, int n) {
    float values[V::lanes] = {};
    for (int i = 0; i < n; ++i) values[i] = widen(p[i]);
    return V::load(values);
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
            for (int k = 0; k < kVectors; ++k) add_squares<V>(sums + k * kParts, loaded<V>(at + k * V::lanes));
        }
    }
    int k = 0;
    for (std::int64_t i = kSquareStreams * stream; i < count; i += V::lanes) {
        const std::int64_t left = count - i;
        const V v = left >= V::lanes ? loaded<V>(x + i) : loaded_first<V>(x + i, static_cast<int>(left));
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
