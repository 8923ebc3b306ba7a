// Chooses the CPU target at run time and runs whole batches on it, parallel over chunks of all tensors.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "backend.h"
#include "check.h"
#include "chunks.h"
#include "targets.h"

namespace lit_fast {

#define LIT_FAST_TARGET_ENTRY(target)      \
    namespace target {                     \
    const CpuKernels& kernels();           \
    const BucketKernels& bucket_kernels(); \
    }
LIT_FAST_CPU_TARGETS(LIT_FAST_TARGET_ENTRY)
#undef LIT_FAST_TARGET_ENTRY

namespace {

bool scalar_supported() { return true; }
#if defined(__x86_64__)
bool avx2_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool avx512_supported() {
    return avx2_supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}
#elif defined(__aarch64__)
bool neon_supported() { return true; }  // part of the base architecture
#endif

template <class Formula>
CoefficientBlock coefficient_block(const double* options, double step, bool first) {
    const typename Formula::Coefficients c = Formula::coefficients(options, step, first);
    CoefficientBlock block{};
    std::memcpy(block.bytes, &c, sizeof(c));
    return block;
}

template <class Formula>
CoefficientBlock block_with_squares(const CoefficientBlock& block, const double* squares) {
    typename Formula::Coefficients c;
    std::memcpy(&c, block.bytes, sizeof(c));
    c = Formula::with_squares(c, squares[0], squares[1]);
    CoefficientBlock result{};
    std::memcpy(result.bytes, &c, sizeof(c));
    return result;
}

template <class Formula>
constexpr auto with_squares_of() -> decltype(FormulaInfo::with_squares) {
    if constexpr (kMeasured<Formula>) {
        return block_with_squares<Formula>;
    } else {
        return nullptr;
    }
}

ChosenTarget choose_at_start() {
    const char* wanted = std::getenv("LIT_FAST_CPU_TARGET");
    if (wanted == nullptr || *wanted == '\0') {
        for (const CpuTarget& target : cpu_targets()) {
            if (target.supported()) return {target, "the best of the built targets that this machine supports"};
        }
    }
    for (const CpuTarget& target : cpu_targets()) {
        if (std::strcmp(target.name, wanted) != 0) continue;
        if (!target.supported()) {
            throw KernelError(
                "LIT_FAST_CPU_TARGET=" + std::string(wanted) +
                ", but this machine lacks these instructions; unset it to let the best target be chosen.");
        }
        return {target, "LIT_FAST_CPU_TARGET"};
    }
    std::string built;
    for (const CpuTarget& target : cpu_targets()) built += (built.empty() ? "" : ", ") + std::string(target.name);
    throw KernelError("LIT_FAST_CPU_TARGET=" + std::string(wanted) + " is not a target of this build, which has " +
                      built + ".");
}

ChosenTarget& current_target() {
    static ChosenTarget chosen = choose_at_start();
    return chosen;
}

// The first pass of formulas whose coefficients depend on norms of a whole tensor.
void measure(StepBatch& batch, const GradientScale& scale, int threads) {
    if (formula_info(batch.formula).with_squares == nullptr) return;
    const auto& table = current_target().target.kernels().measure[static_cast<int>(batch.formula)];
    struct Squares {
        double values[2];
    };
    // The same chunks whatever the number of threads, summed in their order.
    const auto chunks = cut(batch.tasks.size(), kStepChunk, [&](std::size_t t) { return batch.tasks[t].numel; });
    std::vector<Squares> partial(chunks.size());
    const auto run = [&](std::size_t i) {
        const StepTask& task = batch.tasks[static_cast<std::size_t>(chunks[i].tensor)];
        table[static_cast<int>(task.layout)](task, batch.coefficients[static_cast<std::size_t>(task.coefficients)],
                                             scale, chunks[i].begin, chunks[i].end, partial[i].values);
    };
    if (threads <= 1) {
        for (std::size_t i = 0; i < chunks.size(); ++i) run(i);
    } else {
        for_each_chunk(chunks.size(), threads, run);
    }
    std::vector<Squares> sums(batch.tasks.size(), Squares{});
    for (std::size_t i = 0; i < chunks.size(); ++i) {
        Squares& sum = sums[static_cast<std::size_t>(chunks[i].tensor)];
        for (int k = 0; k < 2; ++k) sum.values[k] += partial[i].values[k];
    }
    std::vector<CoefficientBlock> own(batch.tasks.size());
    for (std::size_t t = 0; t < batch.tasks.size(); ++t) {
        const CoefficientBlock& shared = batch.coefficients[static_cast<std::size_t>(batch.tasks[t].coefficients)];
        own[t] = formula_info(batch.formula).with_squares(shared, sums[t].values);
        batch.tasks[t].coefficients = static_cast<std::int32_t>(t);
    }
    batch.coefficients = std::move(own);
}

}  // namespace

const std::vector<CpuTarget>& cpu_targets() {
#define LIT_FAST_TARGET_ENTRY(target) {#target, target##_supported, target::kernels, target::bucket_kernels},
    static const std::vector<CpuTarget> targets = {LIT_FAST_CPU_TARGETS(LIT_FAST_TARGET_ENTRY)};
#undef LIT_FAST_TARGET_ENTRY
    return targets;
}

const ChosenTarget& chosen_cpu_target() { return current_target(); }

void choose_cpu_target(const std::string& name, const std::string& reason) {
    for (const CpuTarget& target : cpu_targets()) {
        if (name != target.name) continue;
        if (!target.supported()) throw KernelError("CPU target " + name + " is not supported by this machine.");
        current_target() = {target, reason};
        return;
    }
    throw KernelError("CPU target " + name + " is not part of this build.");
}

const FormulaInfo& formula_info(FormulaId id) {
#define LIT_FAST_ENTRY(Formula)  \
    {Formula::name,              \
     Formula::option_count,      \
     Formula::option_names,      \
     Formula::states,            \
     Formula::state_names,       \
     Formula::counts_steps,      \
     Formula::form,              \
     Formula::has_remainder,     \
     coefficient_block<Formula>, \
     with_squares_of<Formula>()},
    static const FormulaInfo table[] = {LIT_FAST_FORMULAS(LIT_FAST_ENTRY)};
#undef LIT_FAST_ENTRY
    return table[static_cast<int>(id)];
}

double cpu_sum_of_squares(const std::vector<Span>& grads, int threads) {
    const CpuKernels& kernels = current_target().target.kernels();
    const auto run = [&](std::size_t tensor, std::int64_t begin, std::int64_t end) {
        const Span& g = grads[tensor];
        const auto* bytes = static_cast<const char*>(g.data) + begin * bytes_of(g.dtype);
        return kernels.sum_of_squares[static_cast<int>(g.dtype)](bytes, end - begin);
    };
    double sum = 0.0;
    if (threads <= 1) {
        for (std::size_t t = 0; t < grads.size(); ++t) {
            for (std::int64_t begin = 0; begin < grads[t].numel; begin += kSquareChunk) {
                const std::int64_t end = begin + kSquareChunk;
                sum += run(t, begin, end < grads[t].numel ? end : grads[t].numel);
            }
        }
        return sum;
    }
    const auto chunks = cut(grads.size(), kSquareChunk, [&](std::size_t t) { return grads[t].numel; });
    std::vector<double> partial(chunks.size());
    for_each_chunk(chunks.size(), threads, [&](std::size_t i) {
        partial[i] = run(static_cast<std::size_t>(chunks[i].tensor), chunks[i].begin, chunks[i].end);
    });
    for (const double p : partial) sum += p;
    return sum;
}

void cpu_scale(const std::vector<Span>& grads, const GradientScale& scale, int threads) {
    const CpuKernels& kernels = current_target().target.kernels();
    const auto chunks = cut(grads.size(), kStepChunk, [&](std::size_t t) { return grads[t].numel; });
    for_each_chunk(chunks.size(), threads, [&](std::size_t i) {
        const Span& g = grads[static_cast<std::size_t>(chunks[i].tensor)];
        auto* bytes = static_cast<char*>(g.data) + chunks[i].begin * bytes_of(g.dtype);
        kernels.scale[static_cast<int>(g.dtype)](bytes, scale, chunks[i].end - chunks[i].begin);
    });
}

void cpu_step(StepBatch& batch, const GradientScale& scale, int threads) {
    measure(batch, scale, threads);
    const auto& table = current_target().target.kernels().step[static_cast<int>(batch.formula)];
    const auto run = [&](const StepTask& task, std::int64_t begin, std::int64_t end) {
        table[static_cast<int>(task.layout)](task, batch.coefficients[static_cast<std::size_t>(task.coefficients)],
                                             scale, begin, end);
    };
    if (threads <= 1) {
        for (const StepTask& task : batch.tasks) run(task, 0, task.numel);
        return;
    }
    const auto chunks = cut(batch.tasks.size(), kStepChunk, [&](std::size_t t) { return batch.tasks[t].numel; });
    for_each_chunk(chunks.size(), threads, [&](std::size_t i) {
        run(batch.tasks[static_cast<std::size_t>(chunks[i].tensor)], chunks[i].begin, chunks[i].end);
    });
}

}  // namespace lit_fast
