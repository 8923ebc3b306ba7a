// Runs csrc/cuda/step.cu, compiled as ordinary C++ on cuda_emulation/, against the scalar CPU target: tables that
// overflow one launch, chunk ends, misaligned tensors, every formula and form, every storage that dtypes.h allows,
// steps known to the device only.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>

#include "cases.h"
#include "formulas/storage.h"

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

Tally tally;
std::deque<std::vector<double>> memory;  // of the device, until the program ends
void* workspace(std::int64_t words) {
    memory.emplace_back(static_cast<std::size_t>(words), NAN);
    return memory.back().data();
}

constexpr int kGuardBytes = 64;

// Twice the same numbers, with guards: for the reference and for the emulated device.
struct Twice {
    std::vector<unsigned char> host, device;
    std::int64_t numel;
    std::size_t start;
    Dtype dtype;

    Twice(Dtype dtype, std::int64_t n, int shift, bool positive) : numel(n), dtype(dtype) {
        const auto size = static_cast<std::size_t>(bytes_of(dtype));
        start = kGuardBytes + static_cast<std::size_t>(shift) * size;
        host.resize(start + static_cast<std::size_t>(n) * size + kGuardBytes);
        for (unsigned char& byte : host) byte = static_cast<unsigned char>(random_word());
        for (std::int64_t i = 0; i < n; ++i) {
            const float value = positive ? __builtin_fabsf(ordinary_value()) : ordinary_value();
            unsigned char* at = host.data() + start + static_cast<std::size_t>(i) * size;
            if (dtype == Dtype::float32) std::memcpy(at, &value, 4);
            const bf16 brain = nearest_bf16(value);
            const f16 half = nearest_f16(value);
            if (dtype == Dtype::bfloat16) std::memcpy(at, &brain, 2);
            if (dtype == Dtype::float16) std::memcpy(at, &half, 2);
        }
        device = host;
    }
    void* data(bool on_device) { return (on_device ? device : host).data() + start; }
    void poison(std::int64_t i, float bad) {
        for (const bool on_device : {false, true}) {
            const bf16 brain = nearest_bf16(bad);
            const f16 half = nearest_f16(bad);
            auto* at = static_cast<unsigned char*>(data(on_device)) + i * bytes_of(dtype);
            if (dtype == Dtype::float32) std::memcpy(at, &bad, 4);
            if (dtype == Dtype::bfloat16) std::memcpy(at, &brain, 2);
            if (dtype == Dtype::float16) std::memcpy(at, &half, 2);
        }
    }
    void compare(const char* what, int which, int storage) const {
        if (tally.expect(host == device)) return;
        std::size_t i = 0;
        while (host[i] == device[i]) ++i;
        std::printf("%s, case %d, storage %d: length %ld: byte %ld differs\n", what, which, storage,
                    static_cast<long>(numel), static_cast<long>(i) - static_cast<long>(start));
    }
};

struct Size {
    std::int64_t numel;
    std::uint64_t first_index;
};

// A tensor's own coefficients. The sums are the CPU's, in an order of their own, and float64: what is rounded to
// float32 from them has the same bits.
CoefficientBlock measured(const Case& c, const StepTask& t, const CoefficientBlock& shared,
                          const GradientScale& scale) {
    double squares[2] = {0.0, 0.0};
    if (t.numel > 0) {
        scalar::kernels().measure[static_cast<int>(c.id)][static_cast<int>(t.layout)](t, shared, scale, 0, t.numel,
                                                                                      squares);
    }
    return c.with_squares(shared, squares);
}

// Parameters in `groups` groups, each with coefficients of its own.
// poisoned: one gradient is not finite, or there was one in a step before, so that nothing may change.
enum class Poisoned { no, now, before };
void compare_step(int which, const Storage& storage, int number, const std::vector<Size>& sizes, bool step_on_device,
                  int groups, Poisoned poisoned = Poisoned::no) {
    const Case& c = all()[static_cast<std::size_t>(which)];
    std::deque<Twice> arrays;
    std::deque<float> steps;
    std::vector<Span> grads;
    Twice* longest = nullptr;
    StepBatch host, device;
    host.formula = device.formula = c.id;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const auto group = static_cast<int>(i * static_cast<std::size_t>(groups) / sizes.size());
        if (static_cast<int>(host.coefficients.size()) <= group) {
            Options options = c.options;
            options.step = static_cast<double>(group + 2);
            host.coefficients.push_back(c.coefficients(options));
            device.options.push_back(options);
            device.coefficients.push_back(step_on_device ? CoefficientBlock{} : host.coefficients.back());
        }
        steps.push_back(static_cast<float>(group + 1));
        StepTask tasks[2];
        const int shift = static_cast<int>(i % 3);
        const auto add = [&](Dtype dtype, std::int64_t numel, bool positive, const auto& set) {
            arrays.emplace_back(dtype, numel, shift, positive);
            set(tasks[0], arrays.back().data(false));
            set(tasks[1], arrays.back().data(true));
        };
        const std::int64_t numel = sizes[i].numel;
        add(storage.param, numel, false, [](StepTask& t, void* p) { t.param = p; });
        add(storage.grad, numel, false, [](StepTask& t, void* p) { t.grad = p; });
        grads.push_back({arrays.back().data(true), numel, storage.grad});
        if (longest == nullptr || longest->numel < numel) longest = &arrays.back();
        for (int k = 0; k < kMaxStates; ++k) {
            if (!c.has_state(k)) continue;
            const bool positive = (c.positive >> k & 1U) != 0;
            add(storage.state, numel, positive, [&](StepTask& t, void* p) { t.state[k] = p; });
            if (storage.state != Dtype::uint8) continue;
            add(Dtype::float32, (numel + kCodeBlock - 1) / kCodeBlock, true,
                [&](StepTask& t, void* p) { t.code_scale[k] = static_cast<float*>(p); });
        }
        if (storage.master != Master::none) {
            add(storage.master == Master::float32 ? Dtype::float32 : Dtype::int16, numel, false,
                [](StepTask& t, void* p) { t.master = p; });
        }
        for (StepTask& task : tasks) {
            task.numel = task.body = numel;
            task.layout = layout_of(storage, (c.form & kSetOfForm) == 0);
            task.storage = storage;
            task.form = c.form;
            task.coefficients = group;
            task.first_index = sizes[i].first_index;
            task.seed = 7;
            task.step_number = static_cast<std::uint64_t>(group + 2);
        }
        if (step_on_device) {
            tasks[1].step = &steps.back();
            tasks[1].step_number = 0;
        }
        host.tasks.push_back(tasks[0]);
        device.tasks.push_back(tasks[1]);
    }
    float norm = 2.0F;
    CudaClip clip;
    clip.scale.scale = 0.3F;
    if (which % 2 == 0) clip.scale.limit = 0.1F;
    if (number % 2 == 0) {
        clip.norm = &norm;
        clip.norm_scale = 0.3;
        clip.max_norm = 1.5F;
    }
    // What the device may leave out, and does not where all gradients are finite; a factor that only it knows.
    const float factor = -0.7F;
    if (number % 3 == 0) clip.factor = &factor;
    std::int64_t skipped = poisoned == Poisoned::before ? 3 : 0;
    if (poisoned != Poisoned::no || number % 4 == 0) {
        clip.norm = &norm;
        clip.skipped = &skipped;
        clip.for_good = poisoned == Poisoned::before;
    }
    if (poisoned == Poisoned::now) {
        const float bad[] = {INFINITY, -INFINITY, NAN};
        longest->poison(number % 2 == 0 ? 0 : longest->numel - 1, bad[number % 3]);
    }
    cuda_step(device, grads, clip, workspace, {});
    if (poisoned != Poisoned::no) {
        tally.expect(skipped == (poisoned == Poisoned::now ? 1 : 4));
        tally.expect(std::isfinite(norm) == (poisoned == Poisoned::before));
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            const auto group = static_cast<int>(i * static_cast<std::size_t>(groups) / sizes.size());
            tally.expect(steps[i] == static_cast<float>(group + 1));
        }
        for (const Twice& array : arrays) array.compare("left out", which, number);
        return;
    }
    tally.expect(skipped == 0);
    GradientScale scale = clip.scale;
    if (clip.factor != nullptr) scale.scale *= factor;
    if (clip.max_norm >= 0.0F) scale.scale *= clip_coefficient(norm, clip.max_norm);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const StepTask& t = host.tasks[i];
        const CoefficientBlock& shared = host.coefficients[static_cast<std::size_t>(t.coefficients)];
        scalar::kernels().step[static_cast<int>(c.id)][static_cast<int>(t.layout)](
            t, c.measured ? measured(c, t, shared, scale) : shared, scale, 0, t.numel);
        if (step_on_device) tally.expect(steps[i] == static_cast<float>(t.step_number));
    }
    for (const Twice& array : arrays) array.compare("step", which, number);
}

std::vector<Storage> storages() {
    std::vector<Storage> possible;
    const Dtype kinds[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
    for (const Dtype param : kinds) {
        for (const Dtype grad : kinds) {
            for (const Dtype state : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::uint8}) {
                for (const Master master : {Master::none, Master::float32, Master::remainder}) {
                    for (const bool stochastic : {false, true}) {
                        const Storage storage{param, grad, state, master, stochastic};
                        if (impossible(storage) == nullptr) possible.push_back(storage);
                    }
                }
            }
        }
    }
    return possible;
}

// p - lr * g
StepBatch plain_sgd(std::vector<float>& param, std::vector<float>& grad) {
    const Case& c = all()[5];
    StepBatch batch;
    batch.formula = c.id;
    batch.coefficients.push_back(c.coefficients(c.options));
    batch.options.push_back(c.options);
    StepTask task;
    task.param = param.data();
    task.grad = grad.data();
    task.numel = task.body = static_cast<std::int64_t>(param.size());
    task.form = c.form;
    batch.tasks.push_back(task);
    return batch;
}

// Their norm is infinite in float32, and the step is taken.
void huge_gradients_are_finite() {
    std::vector<float> param(64, 1.0F), grad(64, 3e38F);
    const StepBatch batch = plain_sgd(param, grad);
    float norm = 0.0F;
    std::int64_t skipped = 0;
    CudaClip clip;
    clip.norm = &norm;
    clip.skipped = &skipped;
    cuda_step(batch, {{grad.data(), 64, Dtype::float32}}, clip, workspace, {});
    tally.expect(std::isinf(norm) && skipped == 0);
    for (const float p : param) tally.expect(p == __builtin_fmaf(3e38F, -0.1F, 1.0F));
}

// Whether the step is left out comes as a factor, for which no gradient is read; what it is is in the gradients then.
void a_factor_that_is_nan_leaves_out() {
    for (const float factor : {1.0F, NAN}) {
        std::vector<float> param(64, 1.0F), grad(64, INFINITY);
        const StepBatch batch = plain_sgd(param, grad);
        float norm = 1.0F;
        std::int64_t skipped = 0;
        CudaClip clip;
        clip.norm = &norm;
        clip.skipped = &skipped;
        clip.factor = &factor;
        cuda_step(batch, {}, clip, workspace, {});
        const bool taken = !std::isnan(factor);
        tally.expect(skipped == (taken ? 0 : 1));
        for (const float p : param) tally.expect(p == (taken ? -INFINITY : 1.0F));
    }
}

// Behind 2^24 a float32 counts no further, and those that random bits depend on go back.
void counters_behind_what_they_count_to() {
    const Case& c = all()[0];
    const Storage plain, drawing{Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, Master::none, true};
    for (const float count : {0x1p24F - 1.0F, 0x1p24F, 0x1p23F}) {
        float counters[] = {count, count, count};
        std::vector<std::uint32_t> memory(64);
        StepBatch batch;
        batch.formula = c.id;
        batch.coefficients.emplace_back();
        batch.options.push_back(c.options);
        for (int i = 0; i < 3; ++i) {
            StepTask task;
            task.param = &memory[static_cast<std::size_t>(16 * i)];
            task.grad = task.state[0] = task.state[1] = task.param;
            task.numel = task.body = 1;
            task.storage = i == 1 ? drawing : plain;
            task.layout = layout_of(task.storage, false);
            task.form = c.form;
            task.step = counters + i;
            batch.tasks.push_back(task);
        }
        cuda_step(batch, {}, {}, workspace, {});
        const float stays = count < 0x1p24F ? count + 1.0F : count;
        tally.expect(counters[0] == stays && counters[2] == stays);
        tally.expect(counters[1] == (count < 0x1p24F ? count + 1.0F : 0x1p23F + 1.0F));
    }
}

void compare_norm_and_scale(const std::vector<Dtype>& dtypes, const std::vector<Size>& sizes) {
    std::deque<Twice> grads;
    std::vector<Span> spans;
    double exact = 0.0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const Dtype dtype = dtypes[i % dtypes.size()];
        const std::int64_t numel = sizes[i].numel;
        grads.emplace_back(dtype, numel, static_cast<int>(i % 3), false);
        spans.push_back({grads.back().data(true), numel, dtype});
        for (std::int64_t begin = 0; begin < numel; begin += kSquareChunk) {
            const auto* values = static_cast<const unsigned char*>(grads.back().data(false)) + begin * bytes_of(dtype);
            exact += scalar::kernels().sum_of_squares[static_cast<int>(dtype)](values,
                                                                               std::min(kSquareChunk, numel - begin));
        }
    }
    float norm = -1.0F;
    CudaClip clip;
    clip.scale.scale = 0.5F;
    clip.max_norm = 1.0F;
    clip.norm = &norm;
    clip.norm_scale = 0.5;
    cuda_norm(spans, clip, workspace, {});
    if (!tally.expect(norm == static_cast<float>(0.5 * std::sqrt(exact)))) std::printf("norm differs\n");
    cuda_scale(spans, clip, {});
    GradientScale scale;
    scale.scale = 0.5F * clip_coefficient(norm, 1.0F);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        scalar::kernels().scale[static_cast<int>(spans[i].dtype)](grads[i].data(false), scale, sizes[i].numel);
        grads[i].compare("scale", static_cast<int>(spans[i].dtype), 0);
    }
}

}  // namespace

// One of so many storages is compared with all cases: 1 where nothing is given.
int main(int argc, char** argv) {
    const int every_nth = argc > 1 ? std::atoi(argv[1]) : 1;
    const std::vector<Size> long_ones = {
        {40000, 0}, {0, 0}, {1, 0}, {32768, 0}, {7, 0}, {32769, 1U << 20}, {13, 0}, {65539, (1ULL << 32) - 512}};
    const std::vector<Size> short_ones = {{300, 512}, {23, 0}, {1, 256}, {0, 0}, {256, 1ULL << 33}, {16, 0}, {77, 0}};
    const std::vector<Size> many(150, {5, 0});  // more than one launch's table holds
    const auto cases = static_cast<int>(all().size());
    int measured_case = 0;
    while (!all()[static_cast<std::size_t>(measured_case)].measured) ++measured_case;
    const std::vector<Storage> every = storages();
    // Each storage with cases that wander over all of them, and each case with the direct storages and the densest one.
    for (int s = 0; s < static_cast<int>(every.size()); s += every_nth) {
        const Storage& storage = every[static_cast<std::size_t>(s)];
        const bool direct = layout_of(storage, false) != Layout::staged;
        const bool densest = storage.state == Dtype::uint8 && storage.master == Master::remainder && storage.stochastic;
        for (int c = 0; c < cases; ++c) {
            const bool counts = all()[static_cast<std::size_t>(c)].counts_steps;
            const bool on_device = counts && (s + c) % 3 == 0;
            if (direct || densest || c % 9 == s % 9) compare_step(c, storage, s + c, short_ones, on_device, 1 + c % 3);
        }
        for (const int c : {0, measured_case}) {
            if (direct || densest) compare_step(c, storage, s, long_ones, s % 2 == 0, 8);
        }
    }
    for (const bool step_on_device : {false, true}) {
        for (const int c : {0, measured_case}) compare_step(c, Storage{}, 0, many, step_on_device, 18);
        for (const Poisoned poisoned : {Poisoned::now, Poisoned::before}) {
            compare_step(0, Storage{}, 0, many, step_on_device, 18, poisoned);
            for (int s = step_on_device ? 0 : 1; s < static_cast<int>(every.size()); s += 2 * every_nth) {
                const Storage& storage = every[static_cast<std::size_t>(s)];
                compare_step(s % cases, storage, s, short_ones, step_on_device, 1 + s % 3, poisoned);
            }
        }
    }
    huge_gradients_are_finite();
    counters_behind_what_they_count_to();
    a_factor_that_is_nan_leaves_out();
    compare_norm_and_scale({Dtype::float32}, long_ones);
    compare_norm_and_scale({Dtype::bfloat16, Dtype::float16, Dtype::float32}, long_ones);
    compare_norm_and_scale({Dtype::float32}, many);
    return tally.report();
}
