// Flat memory on CUDA: packing a bucket's gradients, and sums over what several ranks sent. A block of threads takes a
// chunk; what is aligned moves by 128 bits.
#pragma once

#include "direct.cuh"

namespace lit_fast::cuda {

// A bucket is a hundredth of a model: small chunks, so that it has blocks for all of a GPU's multiprocessors.
constexpr std::int64_t kPackChunk = 1 << 12;

struct PackEntry {
    const void* grad;  // nullptr: `fill` instead
    const void* aside;
    std::int64_t begin, count, padded;  // see PackRow in backend.h
    std::int32_t first_chunk;
    Dtype dtype;
    float fill;
};
constexpr int kMaxPackRows = static_cast<int>((kArgumentBytes - 32) / sizeof(PackEntry));

struct PackTable {
    PackEntry rows[kMaxPackRows];
    void* out;
    std::int32_t row_count;
    float scale;
};
static_assert(sizeof(PackTable) <= kArgumentBytes);

constexpr int kSumPack = 8;  // elements of a thread
constexpr std::int64_t kSumChunk = kThreads * kSumPack;

struct SumTable {
    const void* first;
    void* out;
    std::int64_t stride, pieces, count;
    float scale;
};

// kCount neighbours, by accesses of 128 bits.
template <int kCount, class T>
__device__ __forceinline__ void read_elements(const T* p, T (&values)[kCount]) {
    constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
    static_assert(kCount % kWidth == 0);
#pragma unroll
    for (int at = 0; at < kCount; at += kWidth) {
        const Pack<T, kWidth> pack = read_pack<kWidth>(p + at);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values[at + e] = pack.values[e];
    }
}
template <int kCount, class T>
__device__ __forceinline__ void write_elements(T* p, const T (&values)[kCount]) {
    constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int at = 0; at < kCount; at += kWidth) {
        Pack<T, kWidth> pack;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) pack.values[e] = values[at + e];
        write_pack(p + at, pack);
    }
}

__device__ __forceinline__ bool wide(const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

// The sum as a tensor of T holds it.
template <class T>
__device__ __forceinline__ T sum_in(const T& a, const T& b) {
    T rounded;
    store(rounded, load(a) + load(b));
    return rounded;
}

template <class In, class Out>
__device__ __forceinline__ void pack_elements(const PackEntry& row, Out* out, float scale_by, std::int64_t begin,
                                              std::int64_t end) {
    constexpr int kPack = sizeof(In) == 4 && sizeof(Out) == 4 ? 4 : 8;
    const In* grad = global<In>(const_cast<void*>(row.grad));
    const In* aside = row.aside == nullptr ? nullptr : global<In>(const_cast<void*>(row.aside));
    const Lane scale(scale_by);
    const bool is_wide = wide(grad) && wide(out) && (aside == nullptr || wide(aside));
    const std::int64_t packed_end = is_wide ? begin + (end - begin) / kPack * kPack : begin;
    for (std::int64_t i = begin + threadIdx.x * kPack; i < packed_end; i += kThreads * kPack) {
        In values[kPack];
        Out packed[kPack];
        read_elements(grad + i, values);
        if (aside != nullptr) {
            In before[kPack];
            read_elements(aside + i, before);
#pragma unroll
            for (int e = 0; e < kPack; ++e) values[e] = sum_in(before[e], values[e]);
        }
#pragma unroll
        for (int e = 0; e < kPack; ++e) store(packed[e], load(values[e]) * scale);
        write_elements(out + i, packed);
    }
#pragma unroll 1
    for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
        const In value = aside == nullptr ? grad[i] : sum_in(aside[i], grad[i]);
        store(out[i], load(value) * scale);
    }
}

template <class Out>
static __global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackTable table) {
    const PackEntry& row =
        table.rows[entry_of_block(table.row_count, [&](int i) { return table.rows[i].first_chunk; })];
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - row.first_chunk) * kPackChunk;
    const std::int64_t end = begin + kPackChunk < row.padded ? begin + kPackChunk : row.padded;
    const std::int64_t filled = row.count < begin ? begin : row.count < end ? row.count : end;
    Out* out = global<Out>(table.out) + row.begin;
    if (row.grad == nullptr) {
#pragma unroll 1
        for (std::int64_t i = begin + threadIdx.x; i < filled; i += kThreads) store(out[i], Lane(row.fill));
    } else if (row.dtype == Dtype::float32) {
        pack_elements<float>(row, out, table.scale, begin, filled);
    } else if (row.dtype == Dtype::bfloat16) {
        pack_elements<bf16>(row, out, table.scale, begin, filled);
    } else {
        pack_elements<f16>(row, out, table.scale, begin, filled);
    }
#pragma unroll 1
    for (std::int64_t i = filled + threadIdx.x; i < end; i += kThreads) store(out[i], Lane(0.0F));
}

template <class In, class Out>
static __global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumTable table) {
    const In* first = global<In>(const_cast<void*>(table.first));
    Out* out = global<Out>(table.out);
    const Lane scale(table.scale);
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kSumChunk;
    const std::int64_t end = begin + kSumChunk < table.count ? begin + kSumChunk : table.count;
    const bool is_wide = wide(first) && wide(out) && table.stride * sizeof(In) % 16 == 0;
    if (is_wide && begin + kSumChunk == end) {
        const std::int64_t i = begin + threadIdx.x * kSumPack;
        Lane sums[kSumPack];
        In values[kSumPack];
        Out rounded[kSumPack];
        read_elements(first + i, values);
#pragma unroll
        for (int e = 0; e < kSumPack; ++e) sums[e] = load(values[e]);
#pragma unroll 2
        for (std::int64_t k = 1; k < table.pieces; ++k) {
            read_elements(first + k * table.stride + i, values);
#pragma unroll
            for (int e = 0; e < kSumPack; ++e) sums[e] = sums[e] + load(values[e]);
        }
#pragma unroll
        for (int e = 0; e < kSumPack; ++e) store(rounded[e], sums[e] * scale);
        write_elements(out + i, rounded);
        return;
    }
#pragma unroll 1
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        Lane sum = load(first[i]);
        for (std::int64_t k = 1; k < table.pieces; ++k) sum = sum + load(first[k * table.stride + i]);
        store(out[i], sum * scale);
    }
}

}  // namespace lit_fast::cuda
