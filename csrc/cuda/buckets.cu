// Flat memory on CUDA as the host sees it: one launch a bucket, whatever the number of its parameters up to half a
// thousand.
#include <cuda_runtime.h>

#include <cstring>

#include "buckets.cuh"
#include "launch.h"

namespace lit_fast::cuda {
namespace {

// Neighbouring runs that are filled with one value, as the flags of used parameters are, become one.
bool joined(PackEntry& last, const PackRow& row) {
    const bool one = last.grad == nullptr && row.grad == nullptr && last.fill == row.fill &&
                     last.count == last.padded && last.begin + last.count == row.begin;
    if (!one) return false;
    last.count += row.count;
    last.padded += row.padded;
    return true;
}

using PackKernelPointer = void (*)(PackTable);
using SumKernelPointer = void (*)(SumTable);

PackKernelPointer pack_kernel_of(Dtype out) {
    constexpr PackKernelPointer kKernels[kDtypeCount] = {pack_kernel<float>, pack_kernel<bf16>, pack_kernel<f16>};
    return kKernels[static_cast<int>(out)];
}

SumKernelPointer sum_kernel_of(Dtype in, Dtype out) {
    constexpr SumKernelPointer kKernels[kDtypeCount][kDtypeCount] = {
        {sum_kernel<float, float>, sum_kernel<float, bf16>, sum_kernel<float, f16>},
        {sum_kernel<bf16, float>, sum_kernel<bf16, bf16>, sum_kernel<bf16, f16>},
        {sum_kernel<f16, float>, sum_kernel<f16, bf16>, sum_kernel<f16, f16>},
    };
    return kKernels[static_cast<int>(in)][static_cast<int>(out)];
}

}  // namespace
}  // namespace lit_fast::cuda

namespace lit_fast {

void cuda_pack(const PackBatch& batch, const CudaStream& on) {
    cuda::use_device(on.device);
    cuda::PackTable table;
    table.out = batch.out.data;
    table.scale = batch.scale;
    table.row_count = 0;
    const auto flush = [&] {
        std::int64_t blocks = 0;
        for (int r = 0; r < table.row_count; ++r) {
            cuda::PackEntry& row = table.rows[r];
            row.first_chunk = static_cast<std::int32_t>(blocks);
            blocks += (row.padded + cuda::kPackChunk - 1) / cuda::kPackChunk;
        }
        if (blocks > 0) cuda::launch("bucket packing", cuda::pack_kernel_of(batch.out.dtype), blocks, on, table);
        table.row_count = 0;
    };
    for (const PackRow& row : batch.rows) {
        if (row.padded == 0) continue;
        if (table.row_count > 0 && cuda::joined(table.rows[table.row_count - 1], row)) continue;
        if (table.row_count == cuda::kMaxPackRows) flush();
        table.rows[table.row_count++] = {row.grad, row.aside, row.begin, row.count, row.padded, 0, row.dtype, row.fill};
    }
    flush();
}

void cuda_sum_pieces(const PieceSum& task, const CudaStream& on) {
    if (task.out.numel == 0) return;
    cuda::use_device(on.device);
    const cuda::SumTable table{task.first, task.out.data, task.stride, task.pieces, task.out.numel, task.scale};
    const std::int64_t blocks = (task.out.numel + cuda::kSumChunk - 1) / cuda::kSumChunk;
    cuda::launch("sum of pieces", cuda::sum_kernel_of(task.dtype, task.out.dtype), blocks, on, table);
}

}  // namespace lit_fast
