// What a backend must provide: tables of functions, indexed by formula, layout and dtype. Nothing else of a backend is
// visible outside its folder.
#pragma once

#include <cstdint>
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
using SquareKernel = double (*)(const void* values, std::int64_t count);  // count <= kSquareChunk
using ScaleKernel = void (*)(void* values, const GradientScale&, std::int64_t count);

struct CpuKernels {
    StepKernel step[kFormulaCount][kLayoutCount];
    SquareKernel sum_of_squares[kDtypeCount];
    ScaleKernel scale[kDtypeCount];
};

struct CpuTarget {
    const char* name;
    bool (*supported)();
    const CpuKernels& (*kernels)();
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
    bool (*stateless)(const double* options);
    bool (*has_remainder)(const double* options);
    CoefficientBlock (*coefficients)(const double* options, double step, bool first);
};
const FormulaInfo& formula_info(FormulaId id);

// ---- whole batches on the CPU (dispatch.cpp), parallel over chunks ----

struct StepBatch {
    FormulaId formula = FormulaId::count;
    std::vector<StepTask> tasks;
    std::vector<CoefficientBlock> coefficients;
};

double cpu_sum_of_squares(const std::vector<Span>& grads, int threads);
void cpu_scale(const std::vector<Span>& grads, const GradientScale& scale, int threads);
void cpu_step(const StepBatch& batch, const GradientScale& scale, int threads);

}  // namespace lit_fast
