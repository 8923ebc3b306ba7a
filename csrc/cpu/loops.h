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

// Loops with a known small count, whose arrays then are registers.
#define LIT_FAST_UNROLL _Pragma("GCC unroll 4")

// Bytes ahead of the loads of a step, a cache line at a time: the machine cannot look past two or three iterations with
// a division and a root in each. Measured on Zen 3, two threads, float32: none 55.8, 256 58.2, 512 59.5, 1024 57.6,
// 2048 55.3 GB/s.
constexpr int kPrefetchBytes = 512;

// The tensors of one step. With a master weight, `param` is that one and `copy` the 16-bit parameter that follows it.
template <class P, class G, class S, class C = void>
struct Tensors {
    static constexpr bool has_copy = !std::is_void_v<C>;
    P* param;
    const G* grad;
    S* state[kMaxStates];
    C* copy;

    explicit Tensors(const StepTask& task) : grad(static_cast<const G*>(task.grad)), copy(nullptr) {
        param = static_cast<P*>(has_copy ? task.master : task.param);
        if constexpr (has_copy) copy = static_cast<C*>(task.param);
        for (int k = 0; k < kMaxStates; ++k) state[k] = static_cast<S*>(task.state[k]);
    }
    Tensors(P* p, const G* g) : param(p), grad(g), state(), copy(nullptr) {}
};

// One vector; false, with nothing written, where V stores numbers only and a NaN has come up. Every formula moves the
// parameter by something that each state is a factor or a term of, so that the parameter shows it.
template <class Formula, Fused kFused, unsigned kForm, class V, class T>
LIT_FAST_INLINE bool step_vector(const typename Formula::Coefficients& c, const GradientScale& scale, const T& t,
                                 std::int64_t i) {
    constexpr bool kMayClamp = (kForm & kGeneral) != 0;
    V p = V::load(t.param + i);
    const V g = scaled_gradient<kMayClamp>(scale, V::load(t.grad + i));
    V s[Formula::states];
    LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
        if (uses(kForm, k)) s[k] = V::load(t.state[k] + i);
    }
    Formula::template update<kFused, kForm>(c, p, g, s);
    if constexpr (V::numbers_only) {
        if (__builtin_expect(!are_numbers(p), 0)) return false;
    }
    LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
        if (uses(kForm, k)) store(t.state[k] + i, s[k]);
    }
    store(t.param + i, p);
    if constexpr (T::has_copy) store(t.copy + i, p);
    return true;
}

// The first n lanes of a vector.
template <class Formula, Fused kFused, unsigned kForm, class V, class T>
LIT_FAST_INLINE void step_first(const typename Formula::Coefficients& c, const GradientScale& scale, const T& t,
                                std::int64_t i, int n) {
    constexpr bool kMayClamp = (kForm & kGeneral) != 0;
    V p = V::load_first(t.param + i, n);
    const V g = scaled_gradient<kMayClamp>(scale, V::load_first(t.grad + i, n));
    V s[Formula::states];
    LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
        if (uses(kForm, k)) s[k] = V::load_first(t.state[k] + i, n);
    }
    Formula::template update<kFused, kForm>(c, p, g, s);
    LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
        if (uses(kForm, k)) store_first(t.state[k] + i, s[k], n);
    }
    store_first(t.param + i, p, n);
    if constexpr (T::has_copy) store_first(t.copy + i, p, n);
}

template <class T>
LIT_FAST_INLINE void prefetch_line(const T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
}

// Where it stopped: at `end`, or where V stores numbers only at the first vector that is not whole or has a NaN in it.
// kForm: see formulas/math.h. kPrefetch: false for what is in the cache already.
template <class Formula, Fused kFused, unsigned kForm, bool kPrefetch, class V, class T>
LIT_FAST_INLINE std::int64_t step_range(const typename Formula::Coefficients& c, const GradientScale& scale, const T& t,
                                        std::int64_t begin, std::int64_t end) {
    std::int64_t i = begin;
    if constexpr (kPrefetch) {
        constexpr int kLine = 64 / static_cast<int>(sizeof(*t.param));  // elements
        static_assert(kLine % V::lanes == 0);
        for (; i + kLine <= end; i += kLine) {
            prefetch_line(t.param + i);
            prefetch_line(t.grad + i);
            if constexpr (T::has_copy) prefetch_line(t.copy + i);
            LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) prefetch_line(t.state[k] + i);
            }
            LIT_FAST_UNROLL for (int at = 0; at < kLine; at += V::lanes) {
                if (!step_vector<Formula, kFused, kForm, V>(c, scale, t, i + at)) return i + at;
            }
        }
    }
    for (; i + V::lanes <= end; i += V::lanes) {
        if (!step_vector<Formula, kFused, kForm, V>(c, scale, t, i)) return i;
    }
    if constexpr (!V::numbers_only) {
        if (i < end) step_first<Formula, kFused, kForm, V>(c, scale, t, i, static_cast<int>(end - i));
        i = end;
    }
    return i;
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

// What the loop for numbers left out. A function of its own, given nothing of the loop's: a local variable whose
// address goes elsewhere is read from memory again after every store.
template <class Formula, Fused kFused, unsigned kForm, class V, class T>
__attribute__((noinline, cold)) void step_aside(const StepTask& task, const CoefficientBlock& block,
                                                const GradientScale& scale, std::int64_t begin, std::int64_t end) {
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    step_range<Formula, kFused, kForm, false, V>(c, signed_scale(scale, c), T(task), begin, end);
}

template <class Formula, Fused kFused, unsigned kForm, class V, class T>
LIT_FAST_INLINE void step_part(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at,
                               std::int64_t begin, std::int64_t end) {
    // Local copies: a store through a vector pointer could otherwise change them, for all the compiler knows.
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    const GradientScale scale = signed_scale(scale_at, c);
    const T t(task);
    std::int64_t i = step_range<Formula, kFused, kForm, true, V>(c, scale, t, begin, end);
    if constexpr (V::numbers_only) {
        while (i < end) {
            const std::int64_t to = i + V::lanes < end ? i + V::lanes : end;
            step_aside<Formula, kFused, kForm, typename V::Half, T>(task, block, scale_at, i, to);
            i = step_range<Formula, kFused, kForm, true, V>(c, scale, t, to, end);
        }
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

// The body, then torch's remainder with its own order of operations.
template <class Formula, class V, class T>
void step(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale, std::int64_t begin,
          std::int64_t end) {
    const std::int64_t split = end < task.body ? end : (begin < task.body ? task.body : begin);
    for_form<Formula>(clamps(scale) ? task.form | kGeneral : task.form, [&](auto form) {
        step_part<Formula, Fused::second_product, form.value, V, T>(task, block, scale, begin, split);
        if (split < end) step_part<Formula, Fused::first_product, form.value, V, T>(task, block, scale, split, end);
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
