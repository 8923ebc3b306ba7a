// How many kernels the host queues for a model of some 1e9 parameters in 600 tensors: norm and step of every storage,
// with the step on the host and on the device, taken always or if gradients are finite; one more for LAMB, whose norms
// of whole tensors come first. And how often the host waits for the device, which is never. Nothing is computed; the
// addresses are made up.
#include <cstdio>
#include <vector>

#include "cases.h"
#include "cuda_runtime_api.h"

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

// GPT-like: embeddings, and twelve tensors a block, of which four are matrices.
std::vector<std::int64_t> shapes(int tensors) {
    const std::int64_t d = 1280;
    std::vector<std::int64_t> sizes = {50257 * d, 1024 * d};
    for (int i = 2; i < tensors; ++i) {
        const std::int64_t block[] = {d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d};
        sizes.push_back(block[(i - 2) % 12]);
    }
    sizes.resize(static_cast<std::size_t>(tensors));
    return sizes;
}

int launches_of_a_step(FormulaId formula, const Storage& storage, unsigned form, int tensors, int groups,
                       bool on_device, bool guarded, bool with_norm = true) {
    StepBatch batch;
    batch.formula = formula;
    std::vector<Span> grads;
    std::vector<float> steps(static_cast<std::size_t>(tensors));
    std::int64_t all = 0;
    for (int g = 0; g < groups; ++g) {
        batch.options.emplace_back();
        batch.coefficients.emplace_back();
    }
    auto* made_up = reinterpret_cast<float*>(std::uintptr_t{1} << 40);
    for (const std::int64_t numel : shapes(tensors)) {
        StepTask task;
        task.grad = task.param = task.master = made_up;
        for (int k = 0; k < kMaxStates; ++k) {
            task.state[k] = made_up;
            task.code_scale[k] = made_up;
        }
        task.numel = numel;
        task.storage = storage;
        task.layout = layout_of(storage, (form & kSetOfForm) == 0);
        task.form = form;
        const auto i = batch.tasks.size();
        task.coefficients =
            static_cast<std::int32_t>(i * static_cast<std::size_t>(groups) / static_cast<std::size_t>(tensors));
        task.step = on_device ? &steps[i] : nullptr;
        batch.tasks.push_back(task);
        grads.push_back({made_up, numel, storage.grad});
        all += numel;
    }
    std::vector<double> memory;
    float norm = 0.0F;
    CudaClip clip;
    if (with_norm) clip.max_norm = 1.0F;
    if (with_norm) clip.norm = &norm;
    float factor = 1.0F;
    std::int64_t skipped = 0;
    if (guarded) clip.skipped = &skipped;
    if (guarded) clip.factor = &factor;
    launches = 0;
    cuda_step(batch, grads, clip,
              [&](std::int64_t words) {
                  memory.resize(static_cast<std::size_t>(words));
                  return static_cast<void*>(memory.data());
              },
              {});
    if (tensors == 600) std::printf("%.2fe9 parameters: %d launches\n", static_cast<double>(all) / 1e9, launches);
    return launches;
}

}  // namespace

int main() {
    run_kernels = false;
    constexpr unsigned kMoments = 0b011, kAmsgrad = 0b111 | kGeneral;
    const Dtype f32 = Dtype::float32, brain = Dtype::bfloat16;
    Tally tally;
    for (const bool on_device : {false, true}) {
        for (const int groups : {1, 2, 4}) {
            for (const int tensors : {1, 148, 600}) {
                const auto at_most_three = [&](const Storage& storage, unsigned form) {
                    for (const bool guarded : {false, true}) {
                        tally.expect(launches_of_a_step(FormulaId::AdamW, storage, form, tensors, groups, on_device,
                                                        guarded) <= 3);
                    }
                };
                at_most_three({f32, f32, f32, Master::none, false}, kMoments);
                at_most_three({f32, f32, brain, Master::none, false}, kAmsgrad);
                at_most_three({brain, brain, brain, Master::none, true}, kMoments);
                at_most_three({brain, brain, f32, Master::float32, false}, kMoments);
                at_most_three({brain, f32, f32, Master::remainder, false}, kAmsgrad);
                at_most_three({brain, brain, Dtype::uint8, Master::remainder, false}, kMoments);
                for (const Storage& storage :
                     {Storage{}, Storage{brain, brain, Dtype::uint8, Master::remainder, false}}) {
                    const auto launches_of_lamb = [&](bool with_norm) {
                        return launches_of_a_step(FormulaId::Lamb, storage, kMoments | kGeneral, tensors, groups,
                                                  on_device, with_norm, with_norm);
                    };
                    tally.expect(launches_of_lamb(true) <= 4);
                    tally.expect(launches_of_lamb(false) <= 3);
                }
            }
        }
    }
    tally.expect(waits == 0);
    std::printf("%d waits\n", waits);
    return tally.report();
}
