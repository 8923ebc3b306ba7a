// The first pass of a formula whose coefficients depend on norms of a whole tensor, as cpu/measure.h is on the CPU: the
// sums of squares of its parameter and of the direction that it is about to take. No tensor is written.
//
// A warp takes a block of 256 elements, a lane eight neighbours, as in staged.cuh; a storage with a kernel of its own
// is known to the compiler, which then leaves the branches out. Squares are summed in float64, as formulas/norm.h says
// why; what is squared is computed in float32. Element, thread, chunk: the order depends on a tensor's length alone.
//
// The block that comes last to a tensor adds up what all of its blocks have left, in their order, and writes the
// tensor's own coefficients, which the step finds there. So nobody waits, and there is no launch between the two.
#pragma once

#include "staged.cuh"

namespace lit_fast::cuda {

template <Layout kLayout>
LIT_FAST_INLINE constexpr Storage storage_of(const Storage& any) {
    switch (kLayout) {
        case Layout::float32:
            return {};
        case Layout::bfloat16:
            return {Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16};
        case Layout::float32_bfloat16_state:
            return {Dtype::float32, Dtype::float32, Dtype::bfloat16};
        case Layout::bfloat16_master:
            return {Dtype::bfloat16, Dtype::bfloat16, Dtype::float32, Master::float32};
        default:
            return any;
    }
}

template <class Formula, unsigned kForm>
__device__ __forceinline__ void add_squares(double (&squares)[2], const typename Formula::Coefficients& c,
                                            const GradientScale& scale, Row& row, const Storage& storage,
                                            bool all_movable, std::int64_t begin, std::int64_t end) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    for (std::int64_t at = begin + threadIdx.x / kWarp * kCodeBlock; at < end; at += kThreads / kWarp * kCodeBlock) {
        Place place;
        place.first = at + lane * kNeighbours;
        place.count = static_cast<int>(end - at < kCodeBlock ? end - at : kCodeBlock) - lane * kNeighbours;
        place.whole = all_movable && place.count >= kNeighbours;

        float param[kNeighbours], grad[kNeighbours], state[Formula::states][kNeighbours];
        read_param(param, row, storage, place);
        read_number(grad, row.grad, storage.grad, place);
        read_states<Formula, kForm>(state, row, storage, place, at / kCodeBlock);
#pragma unroll
        for (int e = 0; e < kNeighbours; ++e) {
            const Lane p(param[e]);
            Lane s[Formula::states];
#pragma unroll
            for (int k = 0; k < Formula::states; ++k) s[k] = Lane(state[k][e]);
            const Lane g = scaled_gradient(scale, Lane(grad[e]));
            const Lane u = Formula::template direction<Fused::second_product>(c, p, g, s);
            const double both[] = {p.value, e < place.count ? u.value : 0.0F};  // what is not there is read as zero
#pragma unroll
            for (int k = 0; k < 2; ++k) squares[k] = __fma_rn(both[k], both[k], squares[k]);
        }
    }
}

// Whether this is the last block of its row to leave its sums; if so, they are those of the whole tensor then.
__device__ __forceinline__ bool add_blocks(double (&squares)[2], const Work& work, const Measurement& to) {
    __shared__ bool is_last;
    const std::int64_t blocks = (work.row.numel + kChunk - 1) / kChunk;
    if (threadIdx.x == 0) {
        for (int k = 0; k < 2; ++k) to.squares[2 * static_cast<std::int64_t>(blockIdx.x) + k] = squares[k];
        __threadfence();  // before the block is counted
        auto* arrived = reinterpret_cast<unsigned long long*>(to.arrived + work.index);
        is_last = atomicAdd(arrived, 1ULL) + 1 == static_cast<unsigned long long>(blocks);
    }
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    const double* of_row = to.squares + 2 * static_cast<std::int64_t>(work.row.first_chunk);
    for (int k = 0; k < 2; ++k) squares[k] = 0.0;
#pragma unroll 4
    for (std::int64_t i = threadIdx.x; i < blocks; i += kThreads) {
        for (int k = 0; k < 2; ++k) squares[k] += __ldcg(of_row + 2 * i + k);  // not from this multiprocessor's cache
    }
    block_sums(squares);
    return true;
}

template <class Formula, unsigned kForm, Layout kLayout>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(const __grid_constant__ StepTable table, const __grid_constant__ DeviceScale device_scale,
                   const __grid_constant__ Measurement to) {
    __shared__ Work work;
    __shared__ bool all_movable;
    const Storage storage = storage_of<kLayout>(table.storage);
    const bool left_out = is_left_out(device_scale);
    if (threadIdx.x == 0) {
        find_work<false>(table, kForm, work);
        all_movable = movable(work.row, kForm, storage);
    }
    __syncthreads();
    if (left_out) return;
    const typename Formula::Coefficients c = coefficients_of<Formula>(work);
    GradientScale scale = resolve(device_scale);
    scale.scale = __fmul_rn(scale.scale, c.gradient_sign);

    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - work.row.first_chunk) * kChunk;
    const std::int64_t end = begin + kChunk < work.row.numel ? begin + kChunk : work.row.numel;
    double squares[] = {0.0, 0.0};
    add_squares<Formula, kForm>(squares, c, scale, work.row, storage, all_movable, begin, end);
    block_sums(squares);
    if (!add_blocks(squares, work, to) || threadIdx.x != 0) return;
    const typename Formula::Coefficients own = Formula::with_squares(c, squares[0], squares[1]);
    memcpy(work.coefficients, &own, sizeof(own));
    Word* coefficients = to.coefficients + static_cast<std::int64_t>(work.index) * kCoefficientWords;
    for (int i = 0; i < kCoefficientWords; ++i) coefficients[i] = work.coefficients[i];
}

}  // namespace lit_fast::cuda
