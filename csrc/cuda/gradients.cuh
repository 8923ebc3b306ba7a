// Kernels that read or rewrite gradients alone, and the one that runs before a step.
//
// Squares are summed in float64, as formulas/norm.h says why; of a step's arithmetic nothing but the coefficients that
// follow from a counter on the device is float64 (powers of beta, as the host computes them), once a tensor, in
// prepare_kernel.
#pragma once

#include "../formulas/norm.h"
#include "../formulas/steps.h"
#include "direct.cuh"

namespace lit_fast::cuda {

constexpr double kLargest = 1.7976931348623157e308;  // finite

__device__ __forceinline__ const GradTable::Entry& entry_of_block(const GradTable& table) {
    return table.tensors[entry_of_block(table.tensor_count, [&](int i) { return table.tensors[i].first_chunk; })];
}

// Of one tensor, 128 bits an access where it lies so.
template <bool kWrite, std::int64_t kOfBlock, class T, class Visit>
__device__ __forceinline__ void for_each_element(const GradTable::Entry& t, const Visit& visit) {
    constexpr int kPack = 16 / static_cast<int>(sizeof(T));
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - t.first_chunk) * kOfBlock;
    const std::int64_t end = begin + kOfBlock < t.numel ? begin + kOfBlock : t.numel;
    T* values = global<T>(t.data);
    const std::int64_t packed_end = aligned<T, kPack>(values) ? begin + (end - begin) / kPack * kPack : begin;
    for (std::int64_t i = begin + threadIdx.x * kPack; i < packed_end; i += kThreads * kPack) {
        Pack<T, kPack> pack = read_pack<kPack>(values + i);
#pragma unroll
        for (int e = 0; e < kPack; ++e) visit(pack.values[e]);
        if constexpr (kWrite) write_pack(values + i, pack);
    }
#pragma unroll 1
    for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
        T value = values[i];
        visit(value);
        if constexpr (kWrite) values[i] = value;
    }
}

// Calls visit(element) for all elements of the block, which may change them with kWrite.
template <bool kWrite, std::int64_t kOfBlock, class Visit>
__device__ __forceinline__ void for_each_element(const GradTable::Entry& t, const Visit& visit) {
    if (t.dtype == Dtype::float32) {
        for_each_element<kWrite, kOfBlock, float>(t, visit);
    } else if (t.dtype == Dtype::bfloat16) {
        for_each_element<kWrite, kOfBlock, bf16>(t, visit);
    } else {
        for_each_element<kWrite, kOfBlock, f16>(t, visit);
    }
}

struct ScaleElement {
    GradientScale scale;
    template <class T>
    __device__ __forceinline__ void operator()(T& value) const {
        store(value, scaled_gradient(scale, load(value)));
    }
};

struct SquareElement {
    Wide& sum;
    template <class T>
    __device__ __forceinline__ void operator()(const T& value) const {
        add_square(sum, Wide{static_cast<double>(load(value).value)});
    }
};

static __global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ GradTable table, const __grid_constant__ DeviceScale device_scale) {
    for_each_element<true, kChunk>(entry_of_block(table), ScaleElement{resolve(device_scale)});
}

// partial: the sum of squares of each kSquareChunk elements, from each tensor's place on.
static __global__ void __launch_bounds__(kThreads)
    square_kernel(const __grid_constant__ GradTable table, double* partial) {
    Wide sum{0.0};
    const GradTable::Entry& t = entry_of_block(table);
    for_each_element<false, kSquareChunk>(t, SquareElement{sum});
    double total[] = {sum.value};
    block_sums(total);
    if (threadIdx.x == 0) partial[t.place + static_cast<int>(blockIdx.x) - t.first_chunk] = total[0];
}

template <class Formula>
__device__ __forceinline__ void compute_coefficients(const CounterOptions& options, float step, Word* to) {
    Word words[kCoefficientWords] = {};
    const typename Formula::Coefficients c =
        Formula::coefficients(options.values, static_cast<double>(step), options.first != 0);
    memcpy(words, &c, sizeof(c));
    words[kBlockWords] = options.seed;
    words[kBlockWords + 1] = static_cast<Word>(step);
#pragma unroll
    for (int i = 0; i < kCoefficientWords; ++i) to[i] = words[i];
}

// The norm of the scaled gradients, finite exactly when all of them are: a block's sum of all partial sums, the same in
// every block.
__device__ __forceinline__ double total_norm(const PrepareHead& head) {
    double total[] = {0.0};
#pragma unroll 8
    for (std::int64_t i = threadIdx.x; i < head.partials; i += kThreads) total[0] += head.partial[i];
    block_sums(total);
    const double norm = ::sqrt(total[0]) * head.norm_scale;
    return head.factor == nullptr ? norm : norm * ::fabs(static_cast<double>(*head.factor));
}

// Comparisons with NaN are false. A count that another block has raised already tells the same.
__device__ __forceinline__ bool leaves_out(const PrepareHead& head, double norm) {
    return !(norm <= kLargest) || (head.for_good && *head.skipped != 0);
}

// The first block takes the norm, the others the rest, for which they need it where a step may be left out.
static __global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ PrepareTable table) {
    const PrepareHead& head = table.head;
    if (blockIdx.x == 0) {
        if (head.norm == nullptr) return;
        const double norm = total_norm(head);
        if (threadIdx.x != 0) return;
        *head.norm = static_cast<float>(norm);
        if (head.skipped == nullptr) return;
        *head.left_out = leaves_out(head, norm) ? 1U : 0U;
        *head.skipped += *head.left_out;
        return;
    }
    const bool left_out = head.skipped != nullptr && leaves_out(head, total_norm(head));
    const int i = static_cast<int>((blockIdx.x - 1) * kThreads + threadIdx.x);
    if (i < head.cargo_words) head.cargo_to[i] = table.cargo[i];
    if (i >= head.counters) return;
    const CounterOptions& options = table.options[table.options_of[i]];
    const float step = next_step(*table.counter[i], options.draws != 0);
    if (!left_out) *table.counter[i] = step;
    Word* to = head.computed + static_cast<std::int64_t>(i) * kCoefficientWords;
    switch (head.formula) {
#define LIT_FAST_ENTRY(Formula) \
    case FormulaId::Formula:    \
        return compute_coefficients<Formula>(options, step, to);
        LIT_FAST_FORMULAS(LIT_FAST_ENTRY)
#undef LIT_FAST_ENTRY
        case FormulaId::count:
            return;
    }
}

}  // namespace lit_fast::cuda
