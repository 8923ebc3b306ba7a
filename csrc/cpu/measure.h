// The first pass of a formula whose coefficients depend on norms of the whole tensor: the sums of squares of its
// parameter and of the direction that it is about to take. Nothing is written. Any storage, block by block, as a step
// that is staged.
#pragma once

#include "staged.h"

namespace lit_fast::cpu {

template <class Formula, class V, class Wide>
void measure(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at, std::int64_t begin,
             std::int64_t end, double* squares) {
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    const GradientScale scale = signed_scale(scale_at, c);
    Staged t;
    __builtin_memcpy(&t.storage, &task.storage, sizeof(Storage));
    t.param = task.param;
    t.master = task.master;
    t.grad = task.grad;
    for (int k = 0; k < Formula::states; ++k) {
        t.state[k] = task.state[k];
        t.code_scale[k] = task.code_scale[k];
    }
    // Whole vectors: what lies behind the last element is some number, and not summed.
    alignas(64) float param[kBlock] = {}, grad[kBlock] = {}, direction[kBlock] = {},
                      values[Formula::states][kBlock] = {};
    squares[0] = squares[1] = 0.0;
    for (std::int64_t at = begin; at < end; at += kBlock) {
        const int n = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
        load_param(t, param, at, n);
        widen_block(grad, t.grad, t.storage.grad, at, n);
        load_states<Formula, Formula::forms[0]>(t, values, at, n);
        for (int i = 0; i < n; i += V::lanes) {
            V s[Formula::states];
            for (int k = 0; k < Formula::states; ++k) s[k] = V::load(values[k] + i);
            const V g = scaled_gradient(scale, V::load(grad + i));
            store(direction + i, Formula::template direction<Fused::second_product>(c, V::load(param + i), g, s));
        }
        squares[0] += sum_of_squares<V, Wide, float>(param, n);
        squares[1] += sum_of_squares<V, Wide, float>(direction, n);
    }
}

// nullptr for a formula that needs no such pass.
template <class Formula, class V, class Wide>
constexpr MeasureKernel measure_kernel() {
    if constexpr (kMeasured<Formula>) {
        return measure<Formula, V, Wide>;
    } else {
        return nullptr;
    }
}

}  // namespace lit_fast::cpu
