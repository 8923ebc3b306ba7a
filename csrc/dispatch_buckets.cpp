// Flat memory on the CPU, parallel over chunks.
#include <algorithm>
#include <cstring>

#include "backend.h"
#include "chunks.h"
#include "formulas/storage.h"

namespace lit_fast {
namespace {

void fill(char* out, Dtype dtype, float value, std::int64_t count) {
    if (value == 0.0F) {
        std::memset(out, 0, static_cast<std::size_t>(count * bytes_of(dtype)));
    } else if (dtype == Dtype::float32) {
        std::fill_n(reinterpret_cast<float*>(out), count, value);
    } else {
        const std::uint16_t bits = dtype == Dtype::bfloat16 ? nearest_bf16(value).bits : nearest_f16(value).bits;
        std::fill_n(reinterpret_cast<std::uint16_t*>(out), count, bits);
    }
}

const char* moved(const void* data, std::int64_t elements, Dtype dtype) {
    return static_cast<const char*>(data) + elements * bytes_of(dtype);
}

}  // namespace

void cpu_pack(const PackBatch& batch, int threads) {
    const auto& table = chosen_cpu_target().target.bucket_kernels().pack;
    const Dtype dtype = batch.out.dtype;
    const auto run = [&](const PackRow& row, std::int64_t begin, std::int64_t end) {
        char* out = static_cast<char*>(batch.out.data) + (row.begin + begin) * bytes_of(dtype);
        const std::int64_t filled = std::clamp(row.count, begin, end) - begin;  // elements of the gradient's
        if (filled > 0 && row.grad == nullptr) fill(out, dtype, row.fill, filled);
        if (filled > 0 && row.grad != nullptr) {
            table[static_cast<int>(row.dtype)][static_cast<int>(dtype)](
                moved(row.grad, begin, row.dtype), row.aside == nullptr ? nullptr : moved(row.aside, begin, row.dtype),
                out, batch.scale, filled);
        }
        fill(out + filled * bytes_of(dtype), dtype, 0.0F, end - begin - filled);
    };
    if (threads <= 1) {
        for (const PackRow& row : batch.rows) run(row, 0, row.padded);
        return;
    }
    const auto chunks = cut(batch.rows.size(), kStepChunk, [&](std::size_t r) { return batch.rows[r].padded; });
    for_each_chunk(chunks.size(), threads, [&](std::size_t i) {
        run(batch.rows[static_cast<std::size_t>(chunks[i].tensor)], chunks[i].begin, chunks[i].end);
    });
}

void cpu_sum_pieces(const PieceSum& task, int threads) {
    const auto& table = chosen_cpu_target().target.bucket_kernels().sum;
    const SumKernel sum = table[static_cast<int>(task.dtype)][static_cast<int>(task.out.dtype)];
    const auto run = [&](std::int64_t begin, std::int64_t end) {
        sum(moved(task.first, begin, task.dtype), task.stride, task.pieces,
            const_cast<char*>(moved(task.out.data, begin, task.out.dtype)), task.scale, end - begin);
    };
    if (threads <= 1) return run(0, task.out.numel);
    const auto chunks = cut(1, kStepChunk, [&](std::size_t) { return task.out.numel; });
    for_each_chunk(chunks.size(), threads, [&](std::size_t i) { run(chunks[i].begin, chunks[i].end); });
}

void cpu_squares(const SquareBatch& batch, int threads) {
    const auto& table = chosen_cpu_target().target.kernels().sum_of_squares;
    const auto chunks = cut(batch.values.size(), kSquareChunk, [&](std::size_t i) { return batch.values[i].numel; });
    for_each_chunk(chunks.size(), threads, [&](std::size_t i) {
        const auto of = static_cast<std::size_t>(chunks[i].tensor);
        const Span& span = batch.values[of];
        batch.partials[batch.places[of] + chunks[i].begin / kSquareChunk] = table[static_cast<int>(span.dtype)](
            moved(span.data, chunks[i].begin, span.dtype), chunks[i].end - chunks[i].begin);
    });
}

}  // namespace lit_fast
