// The first pass of a formula whose coefficients depend on norms of the whole tensor: the sums of squares of its
// parameter and of the direction that it is about to take. Nothing is written.
//
// Element i of a chunk is added to lane i mod 16 in float64, lanes in a fixed tree: the bits depend on the numbers
// alone, not on the target.
#pragma once

#include "staged.h"

namespace lit_fast::cpu {

template <class Wide>
struct Squares {
    Wide param[kSquareLanes / Wide::lanes], direction[kSquareLanes / Wide::lanes];

    LIT_FAST_INLINE void add_up(double* squares) const {
        double lanes[kSquareLanes];
        for (int k = 0; k < kSquareLanes / Wide::lanes; ++k) param[k].store(lanes + k * Wide::lanes);
        squares[0] = add_lanes(lanes);
        for (int k = 0; k < kSquareLanes / Wide::lanes; ++k) direction[k].store(lanes + k * Wide::lanes);
        squares[1] = add_lanes(lanes);
    }
};

// One vector, or its first n lanes.
template <class Formula, class V, class Wide, class T>
LIT_FAST_INLINE void measure_vector(const typename Formula::Coefficients& c, const GradientScale& scale, const T& t,
                                    std::int64_t i, Wide* of_param, Wide* of_direction) {
    V s[Formula::states];
    for (int k = 0; k < Formula::states; ++k) s[k] = V::load(t.state[k] + i);
    const V p = V::load(t.param + i), g = scaled_gradient(scale, V::load(t.grad + i));
    add_squares<V>(of_param, p);
    add_squares<V>(of_direction, Formula::template direction<Fused::second_product>(c, p, g, s));
}
template <class Formula, class V, class Wide, class T>
LIT_FAST_INLINE void measure_first(const typename Formula::Coefficients& c, const GradientScale& scale, const T& t,
                                   std::int64_t i, int n, Wide* of_param, Wide* of_direction) {
    V s[Formula::states];
    for (int k = 0; k < Formula::states; ++k) s[k] = V::load_first(t.state[k] + i, n);
    const V p = V::load_first(t.param + i, n), g = scaled_gradient(scale, V::load_first(t.grad + i, n));
    float values[V::lanes];  // behind n it is no element's direction
    store(values, Formula::template direction<Fused::second_product>(c, p, g, s));
    add_squares<V>(of_param, p);
    add_squares<V>(of_direction, V::load_first(values, n));
}

// begin is a multiple of kSquareLanes. kPrefetch: false for what is in the cache already.
template <class Formula, bool kPrefetch, class V, class Wide, class T>
LIT_FAST_INLINE void measure_range(const typename Formula::Coefficients& c, const GradientScale& scale, const T& t,
                                   std::int64_t begin, std::int64_t end, Squares<Wide>& sums) {
    constexpr int kParts = V::lanes / Wide::lanes;
    constexpr int kVectors = kSquareLanes / V::lanes;
    std::int64_t i = begin;
    for (; i + kSquareLanes <= end; i += kSquareLanes) {
        if constexpr (kPrefetch) {
            prefetch_line(t.param + i);
            prefetch_line(t.grad + i);
            for (int k = 0; k < Formula::states; ++k) prefetch_line(t.state[k] + i);
        }
        LIT_FAST_UNROLL for (int v = 0; v < kVectors; ++v) {
            measure_vector<Formula, V>(c, scale, t, i + v * V::lanes, sums.param + v * kParts,
                                       sums.direction + v * kParts);
        }
    }
    int at = 0;  // of the lanes that this vector is added to
    for (; i + V::lanes <= end; i += V::lanes, at += kParts) {
        measure_vector<Formula, V>(c, scale, t, i, sums.param + at, sums.direction + at);
    }
    if (i < end) {
        measure_first<Formula, V>(c, scale, t, i, static_cast<int>(end - i), sums.param + at, sums.direction + at);
    }
}

template <class Formula, class V, class Wide, class T>
void measure(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at, std::int64_t begin,
             std::int64_t end, double* squares) {
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    Squares<Wide> sums;
    measure_range<Formula, true, V>(c, signed_scale(scale_at, c), T(task), begin, end, sums);
    sums.add_up(squares);
}

template <class Formula, class V, class Wide>
void measure_staged(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at,
                    std::int64_t begin, std::int64_t end, double* squares) {
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    const GradientScale scale = signed_scale(scale_at, c);
    const Staged t(task);
    alignas(64) float param[kBlock], grad[kBlock], values[Formula::states][kBlock];
    Tensors<float, float, float> tensors(param, grad);
    for (int k = 0; k < Formula::states; ++k) tensors.state[k] = values[k];
    Squares<Wide> sums;
    for (std::int64_t at = begin; at < end; at += kBlock) {
        const int n = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
        prefetch_block(t.param, bytes_of(t.storage.param), at);
        prefetch_block(t.grad, bytes_of(t.storage.grad), at);
        if (t.storage.master == Master::float32) prefetch_block(t.master, 4, at);
        for (int k = 0; k < Formula::states; ++k) prefetch_block(t.state[k], bytes_of(t.storage.state), at);
        load_param(t, param, at, n);
        widen_block(grad, t.grad, t.storage.grad, at, n);
        load_states<Formula, Formula::forms[0]>(t, values, at, n);
        measure_range<Formula, false, V>(c, scale, tensors, 0, n, sums);
    }
    sums.add_up(squares);
}

// T: as of a step; without one any storage. nullptr for a formula that needs no such pass.
template <class Formula, class V, class Wide, class T = void>
constexpr MeasureKernel measure_kernel() {
    if constexpr (!kMeasured<Formula>) {
        return nullptr;
    } else if constexpr (std::is_void_v<T>) {
        return measure_staged<Formula, V, Wide>;
    } else {
        return measure<Formula, V, Wide, T>;
    }
}

}  // namespace lit_fast::cpu
