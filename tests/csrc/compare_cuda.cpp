// Runs csrc/cuda/step.cu, compiled as ordinary C++ on cuda_emulation/, against the scalar CPU target: chunk tables that
// overflow one launch, chunk ends, misaligned tensors, every formula, form and layout, steps known to the device only.
#include <algorithm>
#include <cmath>
#include <deque>

#include "cases.h"

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

Tally tally;

// Twice the same numbers: for the reference and for the emulated device.
template <class T>
struct Twice {
    Guarded<T> host, device;
    Twice(std::int64_t n, int shift, float (*value)()) : host(shift, static_cast<int>(n), value), device(host) {}
    T* data(bool on_device) { return (on_device ? device : host).data(); }
    void compare(const char* what, int which) const { tally.compare(what, which, device, host); }
};

float positive_value() { return __builtin_fabsf(ordinary_value()); }

// Parameters in `groups` groups, each with coefficients of its own.
template <class P, class S>
void compare_step(int which, const Case& c, Layout layout, const std::vector<std::int64_t>& sizes, bool step_on_device,
                  int groups) {
    std::deque<Twice<P>> params, grads;
    std::deque<Twice<S>> states[kMaxStates];
    std::deque<float> steps;
    StepBatch host, device;
    host.formula = device.formula = c.id;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const auto group = static_cast<int>(i * static_cast<std::size_t>(groups) / sizes.size());
        while (static_cast<int>(host.coefficients.size()) <= group) {
            Options options = c.options;
            options.step = static_cast<double>(steps.size() + 2);
            host.coefficients.push_back(c.coefficients(options));
            device.options.push_back(options);
            device.coefficients.push_back(step_on_device ? CoefficientBlock{} : host.coefficients.back());
            steps.push_back(static_cast<float>(options.step) - 1.0F);
        }
        const int shift = static_cast<int>(i % 3);
        params.emplace_back(sizes[i], shift, ordinary_value);
        grads.emplace_back(sizes[i], shift, ordinary_value);
        StepTask task;
        task.numel = task.body = sizes[i];
        task.layout = layout;
        task.form = c.form;
        task.coefficients = group;
        for (int k = 0; k < kMaxStates; ++k) {
            const bool positive = uses(c.positive, k);
            states[k].emplace_back(sizes[i], shift, positive ? positive_value : ordinary_value);
        }
        for (const bool on_device : {false, true}) {
            task.param = params.back().data(on_device);
            task.grad = grads.back().data(on_device);
            for (int k = 0; k < kMaxStates; ++k) {
                if (c.has_state(k)) task.state[k] = states[k].back().data(on_device);
            }
            task.step = on_device && step_on_device ? &steps[static_cast<std::size_t>(group)] : nullptr;
            (on_device ? device : host).tasks.push_back(task);
        }
    }
    const CudaStream stream;
    if (step_on_device) {
        std::vector<float*> counters;
        for (float& step : steps) counters.push_back(&step);
        cuda_count_steps(counters, stream);
    }
    float norm = 2.0F;
    CudaClip clip;
    clip.scale.scale = 0.3F;
    if (which % 2 == 0) clip.scale.limit = 0.1F;
    clip.max_norm = 1.5F;
    clip.norm = &norm;
    cuda_step(device, clip, stream);
    GradientScale scale = clip.scale;
    scale.scale *= clip_coefficient(norm, clip.max_norm);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const StepTask& t = host.tasks[i];
        scalar::kernels().step[static_cast<int>(c.id)][static_cast<int>(layout)](
            t, host.coefficients[static_cast<std::size_t>(t.coefficients)], scale, 0, t.numel);
        params[i].compare("param", which);
        grads[i].compare("grad", which);
        for (auto& state : states) state[i].compare("state", which);
    }
}

template <class P, class S>
void compare_layout(Layout layout, const std::vector<std::int64_t>& sizes, int groups) {
    for (std::size_t i = 0; i < all().size(); ++i) {
        const Case& c = all()[i];
        compare_step<P, S>(static_cast<int>(i), c, layout, sizes, false, groups);
        if (c.counts_steps && !c.options.first) compare_step<P, S>(static_cast<int>(i), c, layout, sizes, true, groups);
    }
}

template <class T>
void compare_norm_and_scale(Dtype dtype, const std::vector<std::int64_t>& sizes) {
    std::deque<Twice<T>> grads;
    std::vector<Span> spans;
    double exact = 0.0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        grads.emplace_back(sizes[i], static_cast<int>(i % 3), ordinary_value);
        spans.push_back({grads.back().data(true), sizes[i], dtype});
        for (std::int64_t begin = 0; begin < sizes[i]; begin += kSquareChunk) {
            const std::int64_t count = std::min(kSquareChunk, sizes[i] - begin);
            exact += scalar::kernels().sum_of_squares[static_cast<int>(dtype)](grads.back().data(false) + begin, count);
        }
    }
    std::vector<double> partial(static_cast<std::size_t>(cuda_norm_chunks(spans)) + 1);
    float norm = -1.0F;
    cuda_norm(spans, 0.5, partial.data(), &norm, {});
    if (!tally.expect(norm == static_cast<float>(0.5 * std::sqrt(exact)))) std::printf("norm differs\n");
    CudaClip clip;
    clip.scale.scale = 0.5F;
    clip.max_norm = 1.0F;
    clip.norm = &norm;
    cuda_scale(spans, clip, {});
    GradientScale scale;
    scale.scale = 0.5F * clip_coefficient(norm, 1.0F);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        scalar::kernels().scale[static_cast<int>(dtype)](grads[i].data(false), scale, sizes[i]);
        grads[i].compare("scale", static_cast<int>(dtype));
    }
}

}  // namespace

int main() {
    const std::vector<std::int64_t> long_ones = {40000, 0, 1, 32768, 7, 32769, 13, 65539};
    const std::vector<std::int64_t> short_ones = {23, 0, 1, 8, 16, 77};
    const std::vector<std::int64_t> many(60, 5);  // more than one launch's table holds
    const Case& adamw = all().front();
    for (const bool step_on_device : {false, true}) {
        compare_step<float, float>(0, adamw, Layout::float32, long_ones, step_on_device, 1);
        compare_step<bf16, bf16>(0, adamw, Layout::bfloat16, long_ones, step_on_device, 3);
        compare_step<float, bf16>(0, adamw, Layout::float32_bfloat16_state, long_ones, step_on_device, 8);
        compare_step<float, float>(0, adamw, Layout::float32, many, step_on_device, 18);  // and more coefficients
    }
    compare_layout<float, float>(Layout::float32, short_ones, 1);
    compare_layout<bf16, bf16>(Layout::bfloat16, short_ones, 2);
    compare_layout<float, bf16>(Layout::float32_bfloat16_state, short_ones, 3);
    compare_norm_and_scale<float>(Dtype::float32, long_ones);
    compare_norm_and_scale<bf16>(Dtype::bfloat16, long_ones);
    compare_norm_and_scale<float>(Dtype::float32, many);
    return tally.report();
}
