// What a backend must provide: tables of functions, indexed by formula, layout and dtype. Nothing else of a backend is
// visible outside its folder.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "dtypes.h"
#include "formulas/all.h"
#include "formulas/norm.h"
#include "formulas/scale.h"
#include "span.h"

namespace lit_fast {

// ---- CPU: one table per instruction set, every function works on elements [begin, end) of one tensor ----

using StepKernel = void (*)(const StepTask&, const CoefficientBlock&, const GradientScale&, std::int64_t begin,
                            std::int64_t end);
// squares: [2], of the parameter and of the direction that the step would take, see formulas/math.h
using MeasureKernel = void (*)(const StepTask&, const CoefficientBlock&, const GradientScale&, std::int64_t begin,
                               std::int64_t end, double* squares);
using SquareKernel = double (*)(const void* values, std::int64_t count);  // count <= kSquareChunk
using ScaleKernel = void (*)(void* values, const GradientScale&, std::int64_t count);

struct CpuKernels {
    StepKernel step[kFormulaCount][kLayoutCount];
    MeasureKernel measure[kFormulaCount][kLayoutCount];  // nullptr where a formula needs none
    SquareKernel sum_of_squares[kDtypeCount];
    ScaleKernel scale[kDtypeCount];
};

// Flat memory, see packer.h. Elements [0, count) from each address.
// out <- scale * (grad + aside), aside may be nullptr. grad or aside may be out.
using PackKernel = void (*)(const void* grad, const void* aside, void* out, float scale, std::int64_t count);
// out <- scale * (the sum of `pieces` arrays, `stride` elements from one to the next, in float32 in their order)
using SumKernel = void (*)(const void* first, std::int64_t stride, std::int64_t pieces, void* out, float scale,
                           std::int64_t count);

struct BucketKernels {
    PackKernel pack[kDtypeCount][kDtypeCount];  // dtype of grad and aside, dtype of out
    SumKernel sum[kDtypeCount][kDtypeCount];    // dtype of the pieces, dtype of out
};

struct CpuTarget {
    const char* name;
    bool (*supported)();
    const CpuKernels& (*kernels)();
    const BucketKernels& (*bucket_kernels)();
};

// Built targets, best first; "scalar" is always the last.
const std::vector<CpuTarget>& cpu_targets();

// The target in use: LIT_FAST_CPU_TARGET or the best that this machine has. Throws KernelError for a name that is
// unknown, not built, or not supported by this machine.
struct ChosenTarget {
    CpuTarget target;
    std::string reason;
};
const ChosenTarget& chosen_cpu_target();
void choose_cpu_target(const std::string& name, const std::string& reason);

// ---- formulas, as data: what the host needs to know of each ----

struct FormulaInfo {
    const char* name;
    int option_count;
    const char* const* option_names;
    int state_count;
    const char* const* state_names;
    bool counts_steps;
    unsigned (*form)(const double* options);  // which states these options need, see formulas/math.h
    bool (*has_remainder)(const double* options);
    CoefficientBlock (*coefficients)(const double* options, double step, bool first);
    // A tensor's own coefficients, from what a MeasureKernel summed; nullptr where they do not depend on it.
    CoefficientBlock (*with_squares)(const CoefficientBlock& block, const double* squares);
};
const FormulaInfo& formula_info(FormulaId id);

// ---- whole batches on the CPU (dispatch.cpp), parallel over chunks ----

struct Options {
    double values[kMaxOptions];
    double step = 0.0;  // as `coefficients` takes them
    bool first = false;
};

struct StepBatch {
    FormulaId formula = FormulaId::count;
    std::vector<StepTask> tasks;
    std::vector<CoefficientBlock> coefficients;
    std::vector<Options> options;  // beside coefficients, for kernels that compute those themselves
};

double cpu_sum_of_squares(const std::vector<Span>& grads, int threads);
void cpu_scale(const std::vector<Span>& grads, const GradientScale& scale, int threads);
// A measured formula's tasks are given coefficients of their own first.
void cpu_step(StepBatch& batch, const GradientScale& scale, int threads);

// One run of a flat buffer: out[begin, begin + count) from a gradient, then zeros as far as begin + padded.
struct PackRow {
    const void* grad = nullptr;   // nullptr: `fill` instead
    const void* aside = nullptr;  // of the same dtype, added to it; nullptr: nothing
    std::int64_t begin = 0;
    std::int64_t count = 0;
    std::int64_t padded = 0;
    Dtype dtype = Dtype::float32;
    float fill = 0.0F;
};
struct PackBatch {
    std::vector<PackRow> rows;
    Span out;
    float scale = 1.0F;
};

// out <- scale * (the sum of `pieces` arrays, `stride` elements from one to the next)
struct PieceSum {
    const void* first = nullptr;
    Dtype dtype = Dtype::float32;
    std::int64_t pieces = 0;
    std::int64_t stride = 0;
    Span out;
    float scale = 1.0F;
};
// partials[places[i] + k] <- the sum of squares of the k-th kSquareChunk elements of values[i]
struct SquareBatch {
    std::vector<Span> values;
    std::vector<std::int64_t> places;
    double* partials = nullptr;
};

void cpu_pack(const PackBatch& batch, int threads);
void cpu_sum_pieces(const PieceSum& task, int threads);
void cpu_squares(const SquareBatch& batch, int threads);

// ---- whole batches on CUDA (cuda/step.cu): everything is queued on the given stream, nothing waits for the device.
// The device must be torch's current one; the memory behind all pointers must live on it until the stream is done,
// which torch's caching allocator guarantees for memory used on its own stream. ----

struct CudaStream {
    int device = 0;
    void* stream = nullptr;  // CUstream
};

struct CudaClip {
    GradientScale scale;
    float max_norm = -1.0F;           // negative: no clipping by norm
    float* norm = nullptr;            // on the device; nullptr: no norm is asked for
    double norm_scale = 1.0;          // the norm is that of the gradients times this
    const float* factor = nullptr;    // on the device: multiplies the gradients, the norm is of what that gives
    std::int64_t* skipped = nullptr;  // on the device: a step with a NaN or infinite gradient is counted there, and
                                      // writes nothing else but the norm, which must be asked for; nullptr: it is taken
    bool for_good = false;            // after the first such step none is taken
};

// Memory on the device of that many 8-byte words, aligned to 16 bytes, which lives until the stream is done.
using CudaWorkspace = std::function<void*(std::int64_t words)>;

// *clip.norm <- norm of grads, in two launches.
void cuda_norm(const std::vector<Span>& grads, const CudaClip& clip, const CudaWorkspace& workspace,
               const CudaStream& on);
void cuda_scale(const std::vector<Span>& grads, const CudaClip& clip, const CudaStream& on);

// Of flat memory, one launch each.
void cuda_pack(const PackBatch& batch, const CudaStream& on);
void cuda_sum_pieces(const PieceSum& task, const CudaStream& on);
void cuda_squares(const SquareBatch& batch, const CudaStream& on);
// *clip.norm <- what cuda_norm finds for gradients with these partial sums.
void cuda_norm_of(const double* partials, std::int64_t count, const CudaClip& clip, const CudaStream& on);

// The norm of grads first, where clip asks for it; then every task, whose counters on the device are counted up.
void cuda_step(const StepBatch& batch, const std::vector<Span>& grads, const CudaClip& clip,
               const CudaWorkspace& workspace, const CudaStream& on);

}  // namespace lit_fast
