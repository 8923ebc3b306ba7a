// Runs csrc/cuda/step.cu, compiled as ordinary C++ on cuda_emulation/, against the scalar CPU target: chunk tables that
// overflow one launch, chunk ends, misaligned tensors, every formula and layout, steps known to the device only.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "backend.h"

namespace lit_fast::scalar {
const CpuKernels& kernels();
}

namespace {

using namespace lit_fast;

int failures = 0;
void expect(bool condition, const char* what, long detail) {
    if (!condition && ++failures < 10) std::printf("%s (%ld)\n", what, detail);
}

float random_value() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5F; }
template <class T>
T as(float value) {
    if constexpr (sizeof(T) == 4) {
        return value;
    } else {
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return {static_cast<std::uint16_t>(bits >> 16)};
    }
}

// Twice the same numbers: for the reference and for the emulated device.
template <class T>
struct Twice {
    std::vector<T> host, device;
    int shift;
    Twice(std::int64_t n, int s, bool positive) : shift(s) {
        for (std::int64_t i = 0; i < n + s; ++i) {
            const float value = random_value();
            host.push_back(as<T>(positive && value < 0 ? -value : value));
        }
        device = host;
    }
    bool same() const { return host.empty() || std::memcmp(host.data(), device.data(), host.size() * sizeof(T)) == 0; }
};

template <class Formula, class P, class S>
void compare_step(FormulaId id, Layout layout, const double* options, const std::vector<std::int64_t>& sizes,
                  bool step_on_device, int groups) {
    std::deque<Twice<P>> params, grads;
    std::deque<Twice<S>> states[2];
    std::deque<float> steps;
    StepBatch host, device;
    host.formula = device.formula = id;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const int shift = static_cast<int>(i % 3);
        const bool stateless = Formula::stateless(options);
        params.emplace_back(sizes[i], shift, false);
        grads.emplace_back(sizes[i], shift, false);
        states[0].emplace_back(sizes[i], shift, false);
        states[1].emplace_back(sizes[i], shift, true);
        const auto group = static_cast<int>(i * static_cast<std::size_t>(groups) / sizes.size());
        while (static_cast<int>(host.coefficients.size()) <= group) {
            const auto step = static_cast<double>(host.coefficients.size() + 2);
            const typename Formula::Coefficients c = Formula::coefficients(options, step, false);
            CoefficientBlock block{};
            std::memcpy(block.bytes, &c, sizeof(c));
            host.coefficients.push_back(block);
            Options all{};
            std::memcpy(all.values, options, sizeof(double) * Formula::option_count);
            device.options.push_back(all);
            device.coefficients.push_back(step_on_device ? CoefficientBlock{} : block);
            steps.push_back(static_cast<float>(step) - 1.0F);
        }
        StepTask task;
        task.numel = task.body = sizes[i];
        task.layout = static_cast<int>(layout);
        task.coefficients = group;
        task.stateless = stateless;
        const auto point = [&](bool to_device) {
            StepTask t = task;
            t.param = (to_device ? params.back().device : params.back().host).data() + shift;
            t.grad = (to_device ? grads.back().device : grads.back().host).data() + shift;
            for (int k = 0; k < 2; ++k) {
                t.state[k] = (to_device ? states[k].back().device : states[k].back().host).data() + shift;
            }
            return t;
        };
        host.tasks.push_back(point(false));
        StepTask on_device = point(true);
        if (step_on_device) on_device.step = &steps[static_cast<std::size_t>(group)];
        device.tasks.push_back(on_device);
    }
    GradientScale scale;
    scale.scale = 0.3F * clip_coefficient(2.0F, 1.5F);
    scale.limit = 0.1F;
    const CudaStream stream;
    if (step_on_device) {
        std::vector<float*> counters;
        for (float& step : steps) counters.push_back(&step);
        cuda_count_steps(counters, stream);
    }
    float norm = 2.0F;
    CudaClip clip;
    clip.scale.scale = 0.3F;
    clip.scale.limit = 0.1F;
    clip.max_norm = 1.5F;
    clip.norm = &norm;
    cuda_step(device, clip, stream);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const StepTask& t = host.tasks[i];
        scalar::kernels().step[static_cast<int>(id)][t.layout](
            t, host.coefficients[static_cast<std::size_t>(t.coefficients)], scale, 0, t.numel);
        const bool same = params[i].same() && grads[i].same() && states[0][i].same() && states[1][i].same();
        expect(same, "step differs, length", static_cast<long>(sizes[i]));
    }
}

template <class P, class S>
void compare_layout(Layout layout, const std::vector<std::int64_t>& sizes, int groups) {
    const double adamw[AdamW::option_count] = {1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 0};
    const double sgd[Sgd::option_count] = {0.1, 0.9, 0.1, 0.01, 0, 1, 0};
    const double plain[Sgd::option_count] = {0.1, 0, 0, 0.01, 0, 0, 0};
    compare_step<AdamW, P, S>(FormulaId::AdamW, layout, adamw, sizes, false, groups);
    compare_step<AdamW, P, S>(FormulaId::AdamW, layout, adamw, sizes, true, groups);
    compare_step<Sgd, P, S>(FormulaId::Sgd, layout, sgd, sizes, false, groups);
    compare_step<Sgd, P, S>(FormulaId::Sgd, layout, plain, sizes, false, groups);
}

template <class T>
void compare_norm_and_scale(Dtype dtype, const std::vector<std::int64_t>& sizes) {
    std::deque<Twice<T>> grads;
    std::vector<Span> spans;
    double exact = 0.0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const int shift = static_cast<int>(i % 3);
        grads.emplace_back(sizes[i], shift, false);
        spans.push_back({grads.back().device.data() + shift, sizes[i], dtype});
        for (std::int64_t begin = 0; begin < sizes[i]; begin += kSquareChunk) {
            const std::int64_t count = std::min(kSquareChunk, sizes[i] - begin);
            exact += scalar::kernels().sum_of_squares[static_cast<int>(dtype)](grads.back().host.data() + shift + begin,
                                                                               count);
        }
    }
    std::vector<double> partial(static_cast<std::size_t>(cuda_norm_chunks(spans)) + 1);
    float norm = -1.0F;
    cuda_norm(spans, 0.5, partial.data(), &norm, {});
    expect(norm == static_cast<float>(0.5 * std::sqrt(exact)), "norm differs", static_cast<long>(sizes.size()));
    CudaClip clip;
    clip.scale.scale = 0.5F;
    clip.max_norm = 1.0F;
    clip.norm = &norm;
    cuda_scale(spans, clip, {});
    GradientScale scale;
    scale.scale = 0.5F * clip_coefficient(norm, 1.0F);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        scalar::kernels().scale[static_cast<int>(dtype)](grads[i].host.data() + grads[i].shift, scale, sizes[i]);
        expect(grads[i].same(), "scale differs, length", static_cast<long>(sizes[i]));
    }
}

}  // namespace

int main() {
    const std::vector<std::int64_t> long_ones = {40000, 0, 1, 32768, 7, 32769, 13, 65539};
    const std::vector<std::int64_t> many(60, 5);  // more than one launch's table holds
    compare_layout<float, float>(Layout::float32, long_ones, 1);
    compare_layout<bf16, bf16>(Layout::bfloat16, long_ones, 3);
    compare_layout<float, bf16>(Layout::float32_bfloat16_state, long_ones, 8);
    compare_layout<float, float>(Layout::float32, many, 18);  // and more coefficients
    compare_norm_and_scale<float>(Dtype::float32, long_ones);
    compare_norm_and_scale<bf16>(Dtype::bfloat16, long_ones);
    compare_norm_and_scale<float>(Dtype::float32, many);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
