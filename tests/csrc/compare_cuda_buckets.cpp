// Runs csrc/cuda/buckets.cu and the squares of step.cu, compiled as ordinary C++ on cuda_emulation/, against the scalar
// CPU target: every pair of dtypes, chunk ends, misaligned gradients, in place, tables that overflow one launch. And
// counts launches: one for each call.
#include <algorithm>
#include <cmath>
#include <deque>

#include "cases.h"
#include "cuda_runtime_api.h"

namespace lit_fast::scalar {
const BucketKernels& bucket_kernels();
}

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

Tally tally;
constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

struct Memory {
    std::vector<unsigned char> bytes;
    std::size_t start;
    Memory(Dtype dtype, std::int64_t numel, int shift) : start(64 + static_cast<std::size_t>(shift * bytes_of(dtype))) {
        bytes.resize(start + static_cast<std::size_t>(numel * bytes_of(dtype)) + 64 + 16);
        // Aligned as a device's memory is, whatever the host's allocator gives.
        start += (16 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 16) % 16;
        for (std::int64_t i = 0; i < numel; ++i) {
            const float value = any_value();
            const float number = value != value ? 0.5F : value;  // a NaN's bits are the machine's
            const auto upper = as<bf16>(number);
            const auto half = as<f16>(number * 0.01F);
            unsigned char* at = data() + i * bytes_of(dtype);
            if (dtype == Dtype::float32) std::memcpy(at, &number, 4);
            if (dtype == Dtype::bfloat16) std::memcpy(at, &upper, 2);
            if (dtype == Dtype::float16) {
                const std::uint16_t finite = half.bits & 0xbbffU;
                std::memcpy(at, &finite, 2);
            }
        }
    }
    unsigned char* data() { return bytes.data() + start; }
};

void reference_pack(const PackBatch& batch) {
    const Dtype dtype = batch.out.dtype;
    for (const PackRow& row : batch.rows) {
        auto* out = static_cast<unsigned char*>(batch.out.data) + row.begin * bytes_of(dtype);
        std::memset(out + row.count * bytes_of(dtype), 0,
                    static_cast<std::size_t>((row.padded - row.count) * bytes_of(dtype)));
        if (row.grad != nullptr) {
            scalar::bucket_kernels().pack[static_cast<int>(row.dtype)][static_cast<int>(dtype)](
                row.grad, row.aside, out, batch.scale, row.count);
            continue;
        }
        for (std::int64_t i = 0; i < row.count; ++i) {
            scalar::bucket_kernels().pack[0][static_cast<int>(dtype)](&row.fill, nullptr, out + i * bytes_of(dtype),
                                                                      1.0F, 1);
        }
    }
}

struct Part {
    std::int64_t count, padding;
    int shift;  // of the gradient's address, elements
    bool has_grad, has_aside;
};

// In flags every second is 1 where they alternate: no two can become one run.
void compare_pack(Dtype out_dtype, const std::vector<Part>& parts, int flags, bool alternating, int expected_launches) {
    std::deque<Memory> memory;
    PackBatch batch;
    batch.scale = 0.37F;
    std::int64_t size = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        PackRow row;
        row.dtype = kDtypes[i % 3];
        row.begin = size;
        row.count = part.count;
        row.padded = part.count + part.padding;
        if (part.has_grad) row.grad = memory.emplace_back(row.dtype, part.count, part.shift).data();
        if (part.has_aside) row.aside = memory.emplace_back(row.dtype, part.count, part.shift).data();
        size += row.padded;
        batch.rows.push_back(row);
    }
    for (int f = 0; f < flags; ++f) {
        PackRow row;
        row.begin = size++;
        row.count = row.padded = 1;
        row.fill = !alternating || f % 2 == 0 ? 1.0F : 0.0F;
        batch.rows.push_back(row);
    }
    Memory expected(out_dtype, size, 0);
    Memory device = expected;
    batch.out = {expected.data(), size, out_dtype};
    reference_pack(batch);
    batch.out.data = device.data();
    const int before = launches;
    cuda_pack(batch, {});
    tally.expect(launches - before == expected_launches);
    if (!tally.expect(expected.bytes == device.bytes)) {
        std::printf("pack: out dtype %d, %zu rows differ\n", static_cast<int>(out_dtype), batch.rows.size());
    }
}

void compare_in_place(Dtype dtype, std::int64_t numel) {
    Memory expected(dtype, numel, 0);
    Memory device = expected;
    for (const bool on_device : {false, true}) {
        PackBatch batch;
        batch.scale = 0.37F;
        PackRow row;
        row.grad = (on_device ? device : expected).data();
        row.dtype = dtype;
        row.count = row.padded = numel;
        batch.rows.push_back(row);
        batch.out = {const_cast<void*>(row.grad), numel, dtype};
        if (on_device) {
            cuda_pack(batch, {});
        } else {
            reference_pack(batch);
        }
    }
    if (!tally.expect(expected.bytes == device.bytes)) std::printf("in place: dtype %d\n", static_cast<int>(dtype));
}

void compare_sum(Dtype in, Dtype out, std::int64_t count, std::int64_t stride, std::int64_t rows, int shift) {
    Memory pieces(in, rows * stride, shift), expected(out, count, 0);
    Memory device = expected;
    scalar::bucket_kernels().sum[static_cast<int>(in)][static_cast<int>(out)](pieces.data(), stride, rows,
                                                                              expected.data(), 0.37F, count);
    PieceSum task;
    task.first = pieces.data();
    task.dtype = in;
    task.pieces = rows;
    task.stride = stride;
    task.out = {device.data(), count, out};
    task.scale = 0.37F;
    const int before = launches;
    cuda_sum_pieces(task, {});
    tally.expect(launches - before == (count > 0 ? 1 : 0));
    if (!tally.expect(expected.bytes == device.bytes)) {
        std::printf("sum: dtypes %d to %d, %ld elements of %ld rows differ\n", static_cast<int>(in),
                    static_cast<int>(out), static_cast<long>(count), static_cast<long>(rows));
    }
}

// One GPU's bits are not the CPU's, in which order a chunk is added up is its own; but a part of a tensor has those of
// the whole, and the norm those that it has from gradients.
void compare_squares() {
    const std::vector<std::int64_t> sizes = {5, 3 * kSquareChunk + 7, 0, kSquareChunk, 2 * kSquareChunk - 1};
    std::deque<std::vector<float>> values;
    std::vector<Span> whole;
    SquareBatch parts;
    std::int64_t place = 2;
    double exact = 0.0;
    for (const std::int64_t numel : sizes) {
        auto& x = values.emplace_back(static_cast<std::size_t>(numel));
        for (float& value : x) {
            value = ordinary_value();
            exact += static_cast<double>(value) * static_cast<double>(value);
        }
        whole.push_back({x.data(), numel, Dtype::float32});
        for (std::int64_t at = 0; at < numel; at += 2 * kSquareChunk) {
            parts.values.insert(parts.values.begin(),
                                {x.data() + at, std::min(2 * kSquareChunk, numel - at), Dtype::float32});
            parts.places.insert(parts.places.begin(), place + at / kSquareChunk);
        }
        place += (numel + kSquareChunk - 1) / kSquareChunk;
    }
    std::vector<double> partials(static_cast<std::size_t>(place + 1), -1.0);
    parts.partials = partials.data();
    const int before = launches;
    cuda_squares(parts, {});
    tally.expect(launches - before == 1);
    tally.expect(partials.front() == -1.0 && partials[1] == -1.0 && partials.back() == -1.0);
    float norms[2] = {-1.0F, -1.0F};
    CudaClip clip;
    clip.norm_scale = 0.5;
    clip.norm = &norms[0];
    cuda_norm_of(partials.data() + 2, place - 2, clip, {});
    clip.norm = &norms[1];
    std::vector<double> workspace(static_cast<std::size_t>(place + 10));
    cuda_norm(whole, clip, [&](std::int64_t) { return static_cast<void*>(workspace.data()); }, {});
    tally.expect(norms[0] == norms[1] &&
                 std::memcmp(workspace.data(), partials.data() + 2, 8 * (partials.size() - 3)) == 0);
    tally.expect(std::fabs(norms[0] - 0.5 * std::sqrt(exact)) < 1e-6 * norms[0]);
}

}  // namespace

int main() {
    const std::vector<Part> parts = {
        {40, 8, 0, true, false},    {5, 11, 1, true, true},        {9001, 0, 0, true, true}, {33, 15, 3, true, false},
        {100, 12, 0, false, false}, {8192, 20000, 0, true, false}, {1, 15, 0, true, true},   {0, 32, 0, false, false},
        {4096, 0, 0, true, false},  {4100, 12, 1, true, false},    {64, 0, 0, true, true},   {4097, 15, 0, true, true}};
    const std::vector<Part> many(100, {3, 13, 0, true, false});  // more than one launch's table holds
    for (const Dtype out : kDtypes) {
        compare_pack(out, parts, 12, false, 1);
        compare_pack(out, parts, 12, true, 1);
        compare_pack(out, many, 0, false, 2);
        compare_pack(out, {}, 3000, false, 1);
        compare_pack(out, {}, 0, false, 0);
        for (const std::int64_t numel : {1, 4096, 9001}) compare_in_place(out, numel);
        for (const Dtype in : kDtypes) {
            for (const std::int64_t rows : {1, 2, 5}) {
                for (const std::int64_t count : {0, 7, 2048, 4099}) {
                    compare_sum(in, out, count, count, rows, 0);
                    compare_sum(in, out, count, count + 8, rows, 0);
                    compare_sum(in, out, count, count + 5, rows, 1);
                }
            }
        }
    }
    compare_squares();
    return tally.report();
}
