// The CUDA side of a step as the host sees it: tables filled, kernels chosen and queued. Norm and step of one kind of
// tensors take three launches, whatever their number is up to a thousand or so: squares, what must be done before the
// step, the step. A formula that depends on norms of whole tensors measures them in one more.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "gradients.cuh"
#include "launch.h"
#include "measure.cuh"
#include "staged.cuh"

namespace lit_fast::cuda {
namespace {

std::int64_t chunks_of(std::int64_t numel) { return (numel + kChunk - 1) / kChunk; }
std::int64_t square_chunks_of(std::int64_t numel) { return (numel + kSquareChunk - 1) / kSquareChunk; }
std::int64_t square_chunks_of(const std::vector<Span>& grads) {
    std::int64_t chunks = 0;
    for (const Span& grad : grads) chunks += square_chunks_of(grad.numel);
    return chunks;
}

DeviceScale device_scale(const CudaClip& clip, const std::uint32_t* left_out = nullptr) {
    return {clip.scale.scale, clip.max_norm, clip.scale.limit, clip.norm, clip.factor, left_out};
}

// Of a norm and of what depends on it.
PrepareHead norm_head(const CudaClip& clip, const double* partial, std::int64_t partials) {
    PrepareHead head;
    head.partial = partial;
    head.partials = partials;
    head.norm_scale = clip.norm_scale;
    head.factor = clip.factor;
    head.norm = clip.norm;
    head.skipped = clip.skipped;
    head.for_good = clip.for_good;
    return head;
}

// ---- which kernel ----

using StepKernelPointer = void (*)(StepTable, DeviceScale);
using MeasureKernelPointer = void (*)(StepTable, DeviceScale, Measurement);
struct Kernels {
    StepKernelPointer step = nullptr;
    MeasureKernelPointer measure = nullptr;  // of formulas that are measured
};

// Tasks that one launch can take.
struct Kind {
    Layout layout;
    unsigned form;
    Storage storage;

    explicit Kind(const StepTask& task) : layout(task.layout), form(task.form | kGeneral), storage(task.storage) {
        const bool direct = layout <= Layout::bfloat16_master;  // the others have no kernel of their own here
        if (!direct) layout = Layout::staged;
    }
    bool operator==(const Kind& other) const {
        const Storage &a = storage, &b = other.storage;
        const bool same = a.param == b.param && a.grad == b.grad && a.state == b.state && a.master == b.master &&
                          a.stochastic == b.stochastic;
        return layout == other.layout && form == other.form && (layout != Layout::staged || same);
    }
};

template <class Formula, unsigned kForm, Layout kLayout>
Kernels measured_before(StepKernelPointer step) {
    if constexpr (kMeasured<Formula>) {
        return {step, measure_kernel<Formula, kForm, kLayout>};
    } else {
        return {step};
    }
}

template <class Formula, unsigned kForm>
Kernels kernels_for(const Kind& kind) {
    switch (kind.layout) {
        case Layout::float32:
            return measured_before<Formula, kForm, Layout::float32>(direct_kernel<Formula, kForm, float, float, false>);
        case Layout::bfloat16:
            return measured_before<Formula, kForm, Layout::bfloat16>(direct_kernel<Formula, kForm, bf16, bf16, false>);
        case Layout::float32_bfloat16_state:
            return measured_before<Formula, kForm, Layout::float32_bfloat16_state>(
                direct_kernel<Formula, kForm, float, bf16, false>);
        case Layout::bfloat16_master:
            return measured_before<Formula, kForm, Layout::bfloat16_master>(
                direct_kernel<Formula, kForm, bf16, float, true>);
        default:
            return measured_before<Formula, kForm, Layout::staged>(staged_kernel<Formula, kForm>);
    }
}

// Memory is the limit here, not instructions: kernels exist for the general forms alone.
template <class Formula, int index = 0>
Kernels kernels_of(const Kind& kind) {
    if constexpr (index < static_cast<int>(sizeof(Formula::forms) / sizeof(Formula::forms[0]))) {
        if constexpr ((Formula::forms[index] & kGeneral) != 0) {
            if (kind.form == Formula::forms[index]) return kernels_for<Formula, Formula::forms[index]>(kind);
        }
        return kernels_of<Formula, index + 1>(kind);
    } else {
        throw KernelError("the form has no CUDA kernel.");
    }
}

Kernels kernels_of(FormulaId formula, const Kind& kind) {
    switch (formula) {
#define LIT_FAST_ENTRY(Formula) \
    case FormulaId::Formula:    \
        return kernels_of<Formula>(kind);
        LIT_FAST_FORMULAS(LIT_FAST_ENTRY)
#undef LIT_FAST_ENTRY
        case FormulaId::count:
            break;
    }
    throw KernelError("the formula has no CUDA kernel.");
}

// ---- gradients alone ----

// Calls visit(table, blocks) for as few tables as hold all of `grads`. chunk: elements of a block.
template <class Visit>
void for_each_table(const std::vector<Span>& grads, std::int64_t chunk, const Visit& visit) {
    GradTable table;
    table.tensor_count = 0;
    std::int64_t blocks = 0;
    const auto flush = [&] {
        if (blocks > 0) visit(table, blocks);
        table.tensor_count = 0;
        blocks = 0;
    };
    for (std::size_t i = 0; i < grads.size(); ++i) {
        const Span& grad = grads[i];
        if (grad.numel == 0) continue;
        if (table.tensor_count == kMaxGrads) flush();
        table.tensors[table.tensor_count++] = {grad.data, grad.numel, static_cast<std::int32_t>(blocks),
                                               static_cast<std::int32_t>(i), grad.dtype};
        blocks += (grad.numel + chunk - 1) / chunk;
    }
    flush();
}

// places: of the first partial sum of each; empty: one behind the other.
void sum_squares(const std::vector<Span>& grads, const std::vector<std::int64_t>& places, double* partial,
                 const CudaStream& on) {
    std::int64_t next = 0;
    for_each_table(grads, kSquareChunk, [&](GradTable& table, std::int64_t blocks) {
        for (int t = 0; t < table.tensor_count; ++t) {
            GradTable::Entry& entry = table.tensors[t];
            const std::int64_t place = places.empty() ? next : places[static_cast<std::size_t>(entry.place)];
            check(place <= 0x7fffffff, "more partial sums than one launch can number.");
            entry.place = static_cast<std::int32_t>(place);
            next += square_chunks_of(entry.numel);
        }
        launch("sum of squares", square_kernel, blocks, on, table, partial);
    });
}

// ---- before a step ----

// What prepare_kernel does, in as few launches as its arguments allow.
struct Preparation {
    PrepareHead head;
    std::vector<float*> counters;
    std::vector<std::int32_t> options_of;  // of each counter, in batch.options
    std::vector<std::uint64_t> seeds;      // of each counter
    std::vector<bool> draws;               // of each counter
    std::vector<Word> cargo;

    void run(const std::vector<Options>& options, const CudaStream& on) const {
        std::size_t counted = 0, carried = 0;
        bool norm = head.norm != nullptr;
        while (norm || counted < counters.size() || carried < cargo.size()) {
            PrepareTable table;
            table.head = head;
            if (!norm) table.head.norm = nullptr;
            norm = false;
            if (!counters.empty()) table.head.computed = head.computed + counted * kCoefficientWords;
            counted = add_counters(table, options, counted);
            const auto words = std::min<std::size_t>(cargo.size() - carried, kCargoWords);
            if (!cargo.empty()) table.head.cargo_to = head.cargo_to + carried;
            table.head.cargo_words = static_cast<std::int32_t>(words);
            std::copy_n(cargo.begin() + static_cast<std::ptrdiff_t>(carried), words, table.cargo);
            carried += words;
            const std::int64_t threads = std::max(table.head.counters, table.head.cargo_words);
            launch("step preparation", prepare_kernel, 1 + (threads + kThreads - 1) / kThreads, on, table);
        }
    }

  private:
    std::size_t add_counters(PrepareTable& table, const std::vector<Options>& options, std::size_t from) const {
        int sets = 0;
        std::size_t i = from;
        for (; i < counters.size() && i - from < kMaxCounters; ++i) {
            if (i == from || options_of[i] != options_of[i - 1] || draws[i] != draws[i - 1]) {
                if (sets == kMaxCounterOptions) break;
                const Options& given = options[static_cast<std::size_t>(options_of[i])];
                CounterOptions& set = table.options[sets++];
                std::copy_n(given.values, kMaxOptions, set.values);
                set.seed = seeds[i];
                set.first = given.first ? 1 : 0;
                set.draws = draws[i] ? 1 : 0;
            }
            table.counter[i - from] = counters[i];
            table.options_of[i - from] = static_cast<std::int16_t>(sets - 1);
        }
        table.head.counters = static_cast<std::int32_t>(i - from);
        return i;
    }
};

// ---- the step ----

Word word(const void* address) { return reinterpret_cast<Word>(address); }

// The stream of words of one launch.
struct Stream {
    Kind kind;
    Kernels kernels;
    std::vector<Row> rows;
    std::vector<std::int32_t> sources;  // of each set of coefficients, a task's index
    std::int64_t blocks = 0;
    std::vector<Word> words;
    std::int32_t row_words = 0;
    std::size_t more_at = 0;  // where its words from kStepWords on begin in the cargo

    void add(const StepBatch& batch, std::size_t index, std::int32_t counter) {
        const StepTask& task = batch.tasks[index];
        Row row{};
        row.param = task.param;
        row.grad = const_cast<void*>(task.grad);
        row.master = task.master;
        std::copy_n(task.state, kMaxStates, row.state);
        std::copy_n(task.code_scale, kMaxStates, row.code_scale);
        row.numel = task.numel;
        row.first_index = task.first_index;
        row.first_chunk = static_cast<std::int32_t>(blocks);
        row.coefficients = ~counter;
        if (counter < 0) {
            if (sources.empty() ||
                batch.tasks[static_cast<std::size_t>(sources.back())].coefficients != task.coefficients) {
                sources.push_back(static_cast<std::int32_t>(index));
            }
            row.coefficients = static_cast<std::int32_t>(sources.size()) - 1;
        }
        rows.push_back(row);
        blocks += chunks_of(task.numel);
        check(blocks <= 0x7fffffff, "more elements than one launch can number.");
    }

    void write(const StepBatch& batch) {
        row_words = kHeadWords;
        for_each_address(rows.front(), kind.form, kind.storage, [&](void*) { ++row_words; });
        const auto base = static_cast<std::int32_t>(rows.size()) * row_words;
        for (Row& row : rows) {
            if (row.coefficients >= 0) row.coefficients = base + row.coefficients * kCoefficientWords;
            words.push_back(static_cast<Word>(row.numel));
            words.push_back(static_cast<std::uint32_t>(row.first_chunk) |
                            static_cast<Word>(static_cast<std::uint32_t>(row.coefficients)) << 32);
            words.push_back(row.first_index);
            for_each_address(row, kind.form, kind.storage, [&](void* address) { words.push_back(word(address)); });
        }
        for (const std::int32_t source : sources) {
            const StepTask& task = batch.tasks[static_cast<std::size_t>(source)];
            Word block[kBlockWords];
            std::memcpy(block, &batch.coefficients[static_cast<std::size_t>(task.coefficients)], sizeof(block));
            words.insert(words.end(), block, block + kBlockWords);
            words.push_back(task.seed);
            words.push_back(task.step_number);
        }
    }

    void run(const Word* cargo, const Word* computed, const DeviceScale& scale, const Measurement& measurement,
             const CudaStream& on) const {
        StepTable table;
        table.more = cargo + more_at;
        table.computed = computed;
        table.storage = kind.storage;
        table.rows = static_cast<std::int32_t>(rows.size());
        table.row_words = row_words;
        std::copy_n(words.begin(), std::min<std::size_t>(words.size(), kStepWords), table.words);
        if (kernels.measure != nullptr) {
            launch("norms of whole tensors", kernels.measure, blocks, on, table, scale, measurement);
            table.computed = measurement.coefficients;
        }
        launch("optimizer step", kernels.step, blocks, on, table, scale);
    }
};

}  // namespace
}  // namespace lit_fast::cuda

namespace lit_fast {

void cuda_norm(const std::vector<Span>& grads, const CudaClip& clip, const CudaWorkspace& workspace,
               const CudaStream& on) {
    cuda::use_device(on.device);
    cuda::Preparation before;
    const std::int64_t partials = cuda::square_chunks_of(grads);
    auto* partial = static_cast<double*>(workspace(partials + 1));
    before.head = cuda::norm_head(clip, partial, partials);
    cuda::sum_squares(grads, {}, partial, on);
    before.run({}, on);
}

void cuda_squares(const SquareBatch& batch, const CudaStream& on) {
    cuda::use_device(on.device);
    if (!batch.values.empty()) cuda::sum_squares(batch.values, batch.places, batch.partials, on);
}

void cuda_norm_of(const double* partials, std::int64_t count, const CudaClip& clip, const CudaStream& on) {
    cuda::use_device(on.device);
    cuda::Preparation before;
    before.head = cuda::norm_head(clip, partials, count);
    before.run({}, on);
}

void cuda_scale(const std::vector<Span>& grads, const CudaClip& clip, const CudaStream& on) {
    cuda::use_device(on.device);
    cuda::for_each_table(grads, cuda::kChunk, [&](const cuda::GradTable& table, std::int64_t blocks) {
        cuda::launch("gradient scale", cuda::scale_kernel, blocks, on, table, cuda::device_scale(clip));
    });
}

void cuda_step(const StepBatch& batch, const std::vector<Span>& grads, const CudaClip& clip,
               const CudaWorkspace& workspace, const CudaStream& on) {
    cuda::use_device(on.device);
    cuda::Preparation before;
    std::vector<cuda::Stream> streams;
    for (std::size_t i = 0; i < batch.tasks.size(); ++i) {
        const StepTask& task = batch.tasks[i];
        std::int32_t counter = -1;
        if (task.step != nullptr) {
            counter = static_cast<std::int32_t>(before.counters.size());
            before.counters.push_back(task.step);
            before.options_of.push_back(task.coefficients);
            before.seeds.push_back(task.seed);
            before.draws.push_back(draws(task.storage));
        }
        if (task.numel == 0) continue;
        const cuda::Kind kind(task);
        auto stream =
            std::find_if(streams.begin(), streams.end(), [&](const cuda::Stream& s) { return s.kind == kind; });
        if (stream == streams.end()) {
            stream = streams.insert(streams.end(),
                                    cuda::Stream{kind, cuda::kernels_of(batch.formula, kind), {}, {}, 0, {}, 0, 0});
        }
        stream->add(batch, i, counter);
    }
    std::int64_t rows = 0, blocks = 0;  // that are measured
    for (cuda::Stream& stream : streams) {
        stream.write(batch);
        stream.more_at = before.cargo.size();
        if (stream.words.size() > cuda::kStepWords) {
            before.cargo.insert(before.cargo.end(), stream.words.begin() + cuda::kStepWords, stream.words.end());
        }
        if (stream.kernels.measure == nullptr) continue;
        rows += static_cast<std::int64_t>(stream.rows.size());
        blocks += stream.blocks;
    }
    const auto arrived_at = static_cast<std::int64_t>(before.cargo.size());
    before.cargo.resize(before.cargo.size() + static_cast<std::size_t>(rows), 0);

    check(clip.norm != nullptr || clip.skipped == nullptr, "whether gradients are finite is known by their norm.");
    std::int64_t size = 0;
    const auto room = [&](std::int64_t words) {
        size += words;
        return size - words;
    };
    const std::int64_t partial_at = room(clip.norm != nullptr ? cuda::square_chunks_of(grads) : 0);
    const std::int64_t computed_at = room(static_cast<std::int64_t>(before.counters.size()) * cuda::kCoefficientWords);
    const std::int64_t cargo_at = room(static_cast<std::int64_t>(before.cargo.size()));
    const std::int64_t measured_at = room(rows * cuda::kCoefficientWords);
    const std::int64_t squares_at = room(2 * blocks);
    const std::int64_t left_out_at = room(clip.skipped != nullptr ? 1 : 0);
    cuda::Word* memory = size > 0 ? static_cast<cuda::Word*>(workspace(size)) : nullptr;
    if (clip.norm != nullptr) {
        auto* partial = reinterpret_cast<double*>(memory + partial_at);
        before.head = cuda::norm_head(clip, partial, cuda::square_chunks_of(grads));
        cuda::sum_squares(grads, {}, partial, on);
    }
    before.head.formula = batch.formula;
    before.head.computed = memory + computed_at;
    before.head.cargo_to = memory + cargo_at;
    if (clip.skipped != nullptr) before.head.left_out = reinterpret_cast<std::uint32_t*>(memory + left_out_at);
    before.run(batch.options, on);
    const cuda::DeviceScale scale = cuda::device_scale(clip, before.head.left_out);
    cuda::Measurement measurement{reinterpret_cast<double*>(memory + squares_at), memory + cargo_at + arrived_at,
                                  memory + measured_at};
    for (const cuda::Stream& stream : streams) {
        stream.run(before.head.cargo_to, before.head.computed, scale, measurement, on);
        if (stream.kernels.measure == nullptr) continue;
        measurement.squares += 2 * stream.blocks;
        measurement.arrived += stream.rows.size();
        measurement.coefficients += static_cast<std::int64_t>(stream.rows.size()) * cuda::kCoefficientWords;
    }
}

}  // namespace lit_fast
