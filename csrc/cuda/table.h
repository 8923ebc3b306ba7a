// What one launch works on, passed by value in the kernel's arguments: it needs no upload, no pinned buffer whose
// lifetime could end too early, and is captured whole by a CUDA graph. What does not fit rides in the arguments of the
// launch before, which writes it to the workspace.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../formulas/all.h"
#include "../formulas/scale.h"
#include "../span.h"

namespace lit_fast::cuda {

// Of a kernel's arguments: 32,764 from CUDA 12.1 on, 4,096 before.
#if CUDART_VERSION >= 12010
constexpr std::int64_t kArgumentBytes = 32764;
#else
constexpr std::int64_t kArgumentBytes = 4096;
#endif
constexpr bool kLargeArguments = kArgumentBytes > 4096;

// One block of threads takes one chunk. 32 Ki elements: 64 to 128 accesses of 128 bits in flight a thread's lifetime,
// and thousands of blocks in a model.
constexpr int kThreads = 256;
constexpr std::int64_t kChunk = 1 << 15;

using Word = std::uint64_t;

// GradientScale while only the device knows what it depends on.
struct DeviceScale {
    float scale;
    float max_norm;  // negative: no clipping by norm
    float limit;
    const float* norm;                        // of the scaled gradients
    const float* factor = nullptr;            // multiplies the gradients, too
    const std::uint32_t* left_out = nullptr;  // not 0: nothing may be written
};

// ---- step: a stream of words, rows first, then the coefficients of which rows share some ----
//
//     row    numel;  first chunk, coefficients (upper half);  first index;  the addresses that there are
//     coefficients    CoefficientBlock; seed; step number

struct Row {
    void *param, *grad, *master;
    void* state[kMaxStates];
    void* code_scale[kMaxStates];
    std::int64_t numel;
    std::uint64_t first_index;
    std::int32_t first_chunk;
    std::int32_t coefficients;  // index in the stream; negative: ~index of those computed on the device
};
constexpr int kHeadWords = 3;
constexpr int kBlockWords = static_cast<int>(sizeof(CoefficientBlock) / sizeof(Word));
constexpr int kCoefficientWords = kBlockWords + 2;

// Every address of a row that this form and storage have, in the order in which it holds them.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the host visits with functions of its own
#endif
template <class Visit>
LIT_FAST_INLINE void for_each_address(Row& row, unsigned form, const Storage& storage, const Visit& visit) {
    visit(row.param);
    visit(row.grad);
    if (storage.master != Master::none) visit(row.master);
    for (int k = 0; k < kMaxStates; ++k) {
        if (!uses(form, k)) continue;
        visit(row.state[k]);
        if (storage.state == Dtype::uint8) visit(row.code_scale[k]);
    }
}

// The first pass of a formula whose coefficients depend on a whole tensor, see measure.cuh. One a launch.
struct Measurement {
    double* squares;     // [blocks, 2]
    Word* arrived;       // [rows], 0 before the launch: how many blocks of each row have added theirs
    Word* coefficients;  // [rows, kCoefficientWords]
};

constexpr int kStepWords =
    static_cast<int>((kArgumentBytes - sizeof(DeviceScale) - sizeof(Measurement) - 64) / sizeof(Word));

struct StepTable {
    const Word* more;      // the stream from word kStepWords on
    const Word* computed;  // coefficients of the rows whose step only the device knows; measured ones: of every row
    Storage storage;       // of all rows
    std::int32_t rows;
    std::int32_t row_words;
    Word words[kStepWords];
};
static_assert(sizeof(StepTable) + sizeof(DeviceScale) + sizeof(Measurement) <= kArgumentBytes);

// ---- what must be done before a step, in a kernel of its own: the norm from its partial sums, whether the step is
// left out, the counters of steps on the device and the coefficients that follow from them, and the words that do not
// fit into a StepTable ----

constexpr int kMaxCounters = kLargeArguments ? 1024 : 96;
constexpr int kMaxCounterOptions = kLargeArguments ? 16 : 4;

struct CounterOptions {
    double values[kMaxOptions];
    std::uint64_t seed;
    std::int32_t first, draws;
};

struct PrepareHead {
    const double* partial = nullptr;  // [partials]
    std::int64_t partials = 0;
    double norm_scale = 1.0;
    const float* factor = nullptr;
    float* norm = nullptr;
    std::int64_t* skipped = nullptr;    // counts the steps that are left out; nullptr: none is
    std::uint32_t* left_out = nullptr;  // of this step
    bool for_good = false;
    Word* computed = nullptr;  // [counters, kCoefficientWords]
    Word* cargo_to = nullptr;
    std::int32_t cargo_words = 0;
    std::int32_t counters = 0;
    FormulaId formula = FormulaId::count;
};
constexpr int kCargoWords =
    static_cast<int>((kArgumentBytes - sizeof(PrepareHead) - sizeof(CounterOptions) * kMaxCounterOptions -
                      (sizeof(float*) + sizeof(std::int16_t)) * kMaxCounters - 16) /
                     sizeof(Word));

struct PrepareTable {
    PrepareHead head;
    CounterOptions options[kMaxCounterOptions];
    float* counter[kMaxCounters];
    Word cargo[kCargoWords];
    std::int16_t options_of[kMaxCounters];
};
static_assert(sizeof(PrepareTable) <= kArgumentBytes);

// ---- gradients alone ----

constexpr int kMaxGrads = kLargeArguments ? 1000 : 120;

struct GradTable {
    struct Entry {
        void* data;
        std::int64_t numel;
        std::int32_t first_chunk;  // of this launch
        std::int32_t place;        // of the first partial sum of squares
        Dtype dtype;
    } tensors[kMaxGrads];
    std::int32_t tensor_count;
};
static_assert(sizeof(GradTable) + sizeof(DeviceScale) <= kArgumentBytes);

}  // namespace lit_fast::cuda
