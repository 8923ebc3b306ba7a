// Runs every kernel of one CPU target and of the scalar reference on the same inputs and compares bits: lengths 0 to
// 70, misaligned starts, random and special values, every formula, layout and order. Built and run by
// test_targets_elsewhere.py for targets that the machine itself lacks.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "backend.h"

namespace lit_fast::scalar {
const CpuKernels& kernels();
}
namespace lit_fast::LIT_FAST_COMPARED {
const CpuKernels& kernels();
}

namespace {

using namespace lit_fast;

std::uint64_t random_state = 0x9e3779b97f4a7c15U;
std::uint32_t random_bits() {
    random_state = random_state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::uint32_t>(random_state >> 33) * 2U + static_cast<std::uint32_t>(random_state >> 63);
}

// Mostly ordinary numbers; now and then zero, denormal, huge, infinite or NaN.
float random_value(bool positive) {
    const std::uint32_t kind = random_bits() % 16;
    float value = static_cast<float>(static_cast<double>(random_bits()) / 4294967296.0 * 2.0 - 1.0);
    if (kind == 0) value = 0.0F;
    if (kind == 1) value = -0.0F;
    if (kind == 2) value *= 1e-41F;
    if (kind == 3) value *= 3e38F;
    if (kind == 4) value = std::numeric_limits<float>::infinity();
    if (kind == 5) value = std::numeric_limits<float>::quiet_NaN();
    if (kind == 6) value *= 1e-20F;
    return positive && value < 0.0F ? -value : value;
}

template <class T>
T as(float value);
template <>
float as<float>(float value) {
    return value;
}
template <>
bf16 as<bf16>(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return {static_cast<std::uint16_t>(value != value ? 0x7fc0U : bits >> 16)};
}

bool same(float a, float b) { return (a != a && b != b) || std::memcmp(&a, &b, 4) == 0; }
bool same(bf16 a, bf16 b) { return a.bits == b.bits; }

constexpr int kGuard = 24;  // elements before and after that must stay as they are

// `count` elements at an offset of `shift` elements from an aligned start, with guards.
template <class T>
struct Guarded {
    std::vector<T> storage;
    int shift, count;
    Guarded(int s, int n, bool positive) : shift(s), count(n) {
        storage.resize(static_cast<std::size_t>(kGuard + s + n + kGuard));
        for (T& value : storage) value = as<T>(random_value(positive));
    }
    T* data() { return storage.data() + kGuard + shift; }
};

long cases = 0, failures = 0;

template <class T>
void compare(const char* what, const Guarded<T>& a, const Guarded<T>& b) {
    ++cases;
    for (std::size_t i = 0; i < a.storage.size(); ++i) {
        if (same(a.storage[i], b.storage[i])) continue;
        if (++failures < 10) {
            std::printf("%s: length %d, shift %d: element %ld differs\n", what, a.count, a.shift,
                        static_cast<long>(i) - kGuard - a.shift);
        }
        return;
    }
}

template <class Formula, class P, class S>
void compare_step(FormulaId id, Layout layout, const double* options, bool first, int count, int shift, int body) {
    typename Formula::Coefficients c = Formula::coefficients(options, 3.0, first);
    CoefficientBlock block{};
    std::memcpy(block.bytes, &c, sizeof(c));
    GradientScale scale;
    scale.scale = 0.37F;
    if (count % 2 == 0) scale.limit = 0.2F;
    const Guarded<P> param(shift, count, false), grad(shift, count, false);
    const Guarded<S> first_state(shift, count, false), second_state(shift, count, true);
    Guarded<P> params[2] = {param, param}, grads[2] = {grad, grad};
    Guarded<S> states[2][2] = {{first_state, second_state}, {first_state, second_state}};
    for (int which = 0; which < 2; ++which) {
        StepTask task;
        task.param = params[which].data();
        task.grad = grads[which].data();
        task.state[0] = states[which][0].data();
        task.state[1] = states[which][1].data();
        task.numel = count;
        task.body = body;
        task.stateless = Formula::stateless(options);
        const CpuKernels& kernels = which == 0 ? scalar::kernels() : LIT_FAST_COMPARED::kernels();
        kernels.step[static_cast<int>(id)][static_cast<int>(layout)](task, block, scale, 0, count);
    }
    compare("param", params[0], params[1]);
    compare("grad", grads[0], grads[1]);
    compare("state 0", states[0][0], states[1][0]);
    compare("state 1", states[0][1], states[1][1]);
}

template <class P, class S>
void compare_steps(Layout layout, int count, int shift) {
    const double adamw[][AdamW::option_count] = {{1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 0},
                                                 {1e-2, 0.4, 0.95, 1e-6, 0.1, 0, 1}};
    const double sgd[][Sgd::option_count] = {
        {0.1, 0, 0, 0, 0, 0, 0}, {0.1, 0.9, 0.1, 0.01, 0, 1, 1}, {0.1, 0.9, 0, 0.01, 1, 0, 0}};
    for (const int body : {count, count - count % 8, 0}) {
        for (const double* o : adamw) compare_step<AdamW, P, S>(FormulaId::AdamW, layout, o, false, count, shift, body);
        for (const double* o : sgd)
            compare_step<Sgd, P, S>(FormulaId::Sgd, layout, o, count % 3 == 0, count, shift, body);
    }
}

template <class T>
void compare_rest(Dtype dtype, int count, int shift) {
    const auto index = static_cast<int>(dtype);
    Guarded<T> grads[2] = {Guarded<T>(shift, count, false), Guarded<T>(shift, 0, false)};
    grads[1] = grads[0];
    const double sums[2] = {scalar::kernels().sum_of_squares[index](grads[0].data(), count),
                            LIT_FAST_COMPARED::kernels().sum_of_squares[index](grads[0].data(), count)};
    ++cases;
    if (std::memcmp(&sums[0], &sums[1], 8) != 0 && !(sums[0] != sums[0] && sums[1] != sums[1])) {
        if (++failures < 10) std::printf("sum of squares: length %d differs\n", count);
    }
    GradientScale scale;
    scale.scale = -3.0F;
    scale.limit = 0.5F;
    scalar::kernels().scale[index](grads[0].data(), scale, count);
    LIT_FAST_COMPARED::kernels().scale[index](grads[1].data(), scale, count);
    compare("scale", grads[0], grads[1]);
}

}  // namespace

int main() {
    for (int count = 0; count <= 70; ++count) {
        for (const int shift : {0, 1, 3}) {
            compare_steps<float, float>(Layout::float32, count, shift);
            compare_steps<bf16, bf16>(Layout::bfloat16, count, shift);
            compare_steps<float, bf16>(Layout::float32_bfloat16_state, count, shift);
            compare_rest<float>(Dtype::float32, count, shift);
            compare_rest<bf16>(Dtype::bfloat16, count, shift);
        }
    }
    std::printf("%ld comparisons, %ld failures\n", cases, failures);
    return failures == 0 ? 0 : 1;
}
