// Steps on CUDA: one block of threads a chunk, what it works on found once a block; and the kernel for the storages
// that convert in registers, in which the widest elements move by 128 bits.
#pragma once

#include "lane.cuh"
#include "table.h"

namespace lit_fast::cuda {

__device__ __forceinline__ GradientScale resolve(const DeviceScale& s) {
    GradientScale scale;
    scale.scale = s.scale;
    if (s.factor != nullptr) scale.scale = __fmul_rn(scale.scale, *s.factor);
    if (s.max_norm >= 0.0F) scale.scale = __fmul_rn(scale.scale, clip_coefficient(*s.norm, s.max_norm));
    scale.limit = s.limit;
    return scale;
}

__device__ __forceinline__ bool is_left_out(const DeviceScale& s) { return s.left_out != nullptr && *s.left_out != 0; }

// The last of `count` entries whose first chunk is not after this block.
template <class FirstChunk>
__device__ __forceinline__ int entry_of_block(int count, const FirstChunk& first_chunk) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_chunk(middle) <= static_cast<int>(blockIdx.x)) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// What a block of threads works on.
struct Work {
    Row row;
    int index;  // of the row
    Word coefficients[kCoefficientWords];
};

// kOwn: each row has coefficients of its own.
template <bool kOwn>
__device__ __forceinline__ void find_work(const StepTable& table, unsigned form, Work& work) {
    const auto word = [&](int i) { return i < kStepWords ? table.words[i] : table.more[i - kStepWords]; };
    work.index = entry_of_block(table.rows, [&](int i) { return static_cast<int>(word(i * table.row_words + 1)); });
    int at = table.row_words * work.index;
    Row& row = work.row;
    row.numel = static_cast<std::int64_t>(word(at));
    row.first_chunk = static_cast<std::int32_t>(word(at + 1));
    row.coefficients = static_cast<std::int32_t>(word(at + 1) >> 32);
    row.first_index = word(at + 2);
    at += kHeadWords;
    for_each_address(row, form, table.storage, [&](void*& address) { address = reinterpret_cast<void*>(word(at++)); });
    const int own = kOwn ? work.index : ~row.coefficients;  // negative: shared
    for (int i = 0; i < kCoefficientWords; ++i) {
        work.coefficients[i] = own < 0 ? word(row.coefficients + i) : table.computed[own * kCoefficientWords + i];
    }
}

template <class Formula>
__device__ __forceinline__ typename Formula::Coefficients coefficients_of(const Work& work) {
    typename Formula::Coefficients c;
    memcpy(&c, work.coefficients, sizeof(c));
    return c;
}

// Sums over the block in a fixed order, the same in every thread.
template <int kCount>
__device__ __forceinline__ void block_sums(double (&mine)[kCount]) {
    __shared__ double sums[kCount][kThreads];
    for (int k = 0; k < kCount; ++k) sums[k][threadIdx.x] = mine[k];
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            for (int k = 0; k < kCount; ++k) sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
        }
        __syncthreads();
    }
    for (int k = 0; k < kCount; ++k) mine[k] = sums[k][0];
}

template <class Formula, unsigned kForm>
__device__ __forceinline__ void update(const typename Formula::Coefficients& c, const GradientScale& scale, Lane& param,
                                       Lane grad, Lane (&state)[Formula::states]) {
    // Order of the vector loop everywhere: torch's CUDA kernels have no remainder loop to agree with.
    Formula::template update<Fused::second_product, kForm>(c, param, scaled_gradient(scale, grad), state);
}

// Blocks that must share a multiprocessor; 0 leaves it to the compiler, which for LAMB on sm_80 spilled a register to
// have a fifth.
template <class Formula>
constexpr int kBlocksTogether = kMeasured<Formula> ? 4 : 0;

// P: parameter and gradient, S: states; with kMaster a float32 master, which is stepped in the parameter's stead.
template <class Formula, unsigned kForm, class P, class S, bool kMaster>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<Formula>)
    direct_kernel(const __grid_constant__ StepTable table, const __grid_constant__ DeviceScale device_scale) {
    constexpr bool kWide = kMaster || sizeof(P) == 4 || sizeof(S) == 4;
    constexpr int kPack = kWide ? 4 : 8;  // elements of one access of 128 bits
    using W = std::conditional_t<kMaster, float, P>;

    __shared__ Work work;
    const bool left_out = is_left_out(device_scale);
    if (threadIdx.x == 0) find_work<kMeasured<Formula>>(table, kForm, work);
    __syncthreads();
    if (left_out) return;
    const typename Formula::Coefficients c = coefficients_of<Formula>(work);
    GradientScale scale = resolve(device_scale);
    scale.scale = __fmul_rn(scale.scale, c.gradient_sign);

    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - work.row.first_chunk) * kChunk;
    const std::int64_t end = begin + kChunk < work.row.numel ? begin + kChunk : work.row.numel;
    P* param = global<P>(work.row.param);
    W* weight = global<W>(kMaster ? work.row.master : work.row.param);
    const P* grad = global<const P>(work.row.grad);
    S* state[Formula::states];
    bool packed = aligned<P, kPack>(param) && aligned<P, kPack>(grad) && aligned<W, kPack>(weight);
#pragma unroll
    for (int k = 0; k < Formula::states; ++k) {
        state[k] = global<S>(work.row.state[k]);
        if (uses(kForm, k)) packed = packed && aligned<S, kPack>(state[k]);
    }

    const std::int64_t packed_end = packed ? begin + (end - begin) / kPack * kPack : begin;
    for (std::int64_t i = begin + threadIdx.x * kPack; i < packed_end; i += kThreads * kPack) {
        Pack<W, kPack> w = read_pack<kPack>(weight + i);
        const Pack<P, kPack> g = read_pack<kPack>(grad + i);
        Pack<S, kPack> s[Formula::states];
#pragma unroll
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) s[k] = read_pack<kPack>(state[k] + i);
        }
        Pack<P, kPack> p;
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
            Lane lane = load(w.values[e]);
            Lane lanes[Formula::states];
#pragma unroll
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) lanes[k] = load(s[k].values[e]);
            }
            update<Formula, kForm>(c, scale, lane, load(g.values[e]), lanes);
#pragma unroll
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) store(s[k].values[e], lanes[k]);
            }
            store(w.values[e], lane);
            if constexpr (kMaster) store(p.values[e], lane);
        }
#pragma unroll
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) write_pack(state[k] + i, s[k]);
        }
        write_pack(weight + i, w);
        if constexpr (kMaster) write_pack(param + i, p);
    }
    // What is misaligned or does not fill a pack, an element a thread.
#pragma unroll 1
    for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
        Lane lane = load(weight[i]);
        Lane lanes[Formula::states];
#pragma unroll
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) lanes[k] = load(state[k][i]);
        }
        update<Formula, kForm>(c, scale, lane, load(grad[i]), lanes);
#pragma unroll
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) store(state[k][i], lanes[k]);
        }
        store(weight[i], lane);
        if constexpr (kMaster) store(param[i], lane);
    }
}

}  // namespace lit_fast::cuda
