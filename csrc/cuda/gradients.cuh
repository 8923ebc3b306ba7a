// Kernels that read or rewrite gradients alone, and the one that runs before a step.
//
// Squares are summed in float64, as formulas/norm.h says why; of a step's arithmetic nothing but the coefficients that
// follow from a counter on the device is float64 (powers of beta, as the host computes them), once a tensor, in
// prepare_kernel.
#pragma once

#include "direct.cuh"

namespace lit_fast::cuda {

__device__ __forceinline__ const GradTable::Entry& entry_of_block(const GradTable& table) {
    return table.tensors[entry_of_block(table.tensor_count, [&](int i) { return table.tensors[i].first_chunk; })];
}

// Calls visit(element) for the block's elements of one tensor, a pack a thread where the tensor lies so.
template <class T, class Visit>
__device__ __forceinline__ void for_each_element(const GradTable::Entry& t, const Visit& visit) {
    constexpr int kPack = 16 / static_cast<int>(sizeof(T));
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - t.first_chunk) * kChunk;
    const std::int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
    T* values = static_cast<T*>(t.data);
    const std::int64_t packed_end = aligned<T, kPack>(values) ? begin + (end - begin) / kPack * kPack : begin;
    for (std::int64_t i = begin + threadIdx.x * kPack; i < packed_end; i += kThreads * kPack) {
        visit(*reinterpret_cast<Pack<T, kPack>*>(values + i));
    }
    for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
        visit(*reinterpret_cast<Pack<T, 1>*>(values + i));
    }
}

// Calls visit(elements as a Pack of their type) for each access of the block.
template <class Visit>
__device__ __forceinline__ void for_each_pack(const GradTable& table, const Visit& visit) {
    const GradTable::Entry& t = entry_of_block(table);
    if (t.dtype == Dtype::float32) {
        for_each_element<float>(t, visit);
    } else if (t.dtype == Dtype::bfloat16) {
        for_each_element<bf16>(t, visit);
    } else {
        for_each_element<f16>(t, visit);
    }
}

struct ScalePack {
    GradientScale scale;
    template <class T, int kCount>
    __device__ __forceinline__ void operator()(Pack<T, kCount>& at) const {
        Pack<T, kCount> pack = at;
#pragma unroll
        for (int e = 0; e < kCount; ++e) store(pack.values[e], scaled_gradient(scale, load(pack.values[e])));
        at = pack;
    }
};

struct SquarePack {
    Wide& sum;
    template <class T, int kCount>
    __device__ __forceinline__ void operator()(const Pack<T, kCount>& at) const {
        const Pack<T, kCount> pack = at;
#pragma unroll
        for (int e = 0; e < kCount; ++e) add_square(sum, Wide{static_cast<double>(load(pack.values[e]).value)});
    }
};

static __global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ GradTable table, const __grid_constant__ DeviceScale device_scale) {
    for_each_pack(table, ScalePack{resolve(device_scale)});
}

// Sum over the block in a fixed order, in thread 0.
__device__ __forceinline__ double block_sum(double mine) {
    __shared__ double sums[kThreads];
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

// partial: [chunks of this launch], the sum of squares of each chunk.
static __global__ void __launch_bounds__(kThreads)
    square_kernel(const __grid_constant__ GradTable table, double* partial) {
    Wide sum{0.0};
    for_each_pack(table, SquarePack{sum});
    const double total = block_sum(sum.value);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
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

// The first block takes the norm, the others the rest.
static __global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ PrepareTable table) {
    const PrepareHead& head = table.head;
    if (blockIdx.x == 0) {
        if (head.norm == nullptr) return;
        double mine = 0.0;
#pragma unroll 8
        for (std::int64_t i = threadIdx.x; i < head.partials; i += kThreads) mine += head.partial[i];
        const double total = block_sum(mine);
        if (threadIdx.x == 0) *head.norm = static_cast<float>(::sqrt(total) * head.norm_scale);
        return;
    }
    const int i = static_cast<int>((blockIdx.x - 1) * kThreads + threadIdx.x);
    if (i < head.cargo_words) head.cargo_to[i] = table.cargo[i];
    if (i >= head.counters) return;
    const float step = __fadd_rn(*table.counter[i], 1.0F);
    *table.counter[i] = step;
    const CounterOptions& options = table.options[table.options_of[i]];
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
