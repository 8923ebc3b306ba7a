// Runs every kernel of one CPU target and of the scalar reference on the same inputs and compares bits: lengths 0 to
// 70, misaligned starts, random and special values, every formula, form, direct layout and order. A plain form must
// give the bits of the general one, too. Built and run by test_targets_elsewhere.py.
#include "cases.h"

namespace lit_fast::compared_target {
const CpuKernels& kernels();
}

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

Tally tally;

template <class P, class S>
struct Arrays {
    Guarded<P> param, grad;
    std::vector<Guarded<S>> state;

    Arrays(const Case& c, int shift, int count) : param(shift, count, any_value), grad(shift, count, any_value) {
        for (int k = 0; k < kMaxStates; ++k) {
            const bool positive = uses(c.positive, k);
            state.emplace_back(shift, count, positive ? [] { return __builtin_fabsf(any_value()); } : any_value);
        }
    }

    void step(const CpuKernels& kernels, const Case& c, unsigned form, Layout layout, const GradientScale& scale,
              int body) {
        StepTask task;
        task.param = param.data();
        task.grad = grad.data();
        for (int k = 0; k < kMaxStates; ++k) {
            if (c.has_state(k)) task.state[k] = state[static_cast<std::size_t>(k)].data();
        }
        task.numel = param.count;
        task.body = body;
        task.form = form;
        task.layout = layout;
        kernels.step[static_cast<int>(c.id)][static_cast<int>(layout)](task, c.coefficients(c.options), scale, 0,
                                                                       param.count);
    }

    void compare(const Arrays& other, int which) const {
        tally.compare("param", which, param, other.param);
        tally.compare("grad", which, grad, other.grad);
        for (std::size_t k = 0; k < state.size(); ++k) tally.compare("state", which, state[k], other.state[k]);
    }
};

template <class P, class S>
void compare_steps(Layout layout, int count, int shift) {
    for (std::size_t which = 0; which < all().size(); ++which) {
        const Case& c = all()[which];
        for (const int body : {count, count - count % 8, 0}) {
            if (body != count && !c.has_remainder) continue;
            GradientScale scale;
            scale.scale = 0.37F;
            if ((count + shift) % 2 != 0) scale.limit = 0.2F;
            const Arrays<P, S> start(c, shift, count);
            Arrays<P, S> expected = start, compared = start;
            expected.step(scalar::kernels(), c, c.form, layout, scale, body);
            compared.step(compared_target::kernels(), c, c.form, layout, scale, body);
            compared.compare(expected, static_cast<int>(which));
            if ((c.form & kGeneral) != 0) continue;
            Arrays<P, S> general = start;
            general.step(compared_target::kernels(), c, c.form | kGeneral, layout, scale, body);
            general.compare(expected, static_cast<int>(which));
        }
    }
}

template <class T>
void compare_rest(Dtype dtype, int count, int shift) {
    const auto index = static_cast<int>(dtype);
    Guarded<T> expected(shift, count, any_value);
    Guarded<T> compared = expected;
    const double sums[2] = {scalar::kernels().sum_of_squares[index](expected.data(), count),
                            compared_target::kernels().sum_of_squares[index](compared.data(), count)};
    const bool both_nan = sums[0] != sums[0] && sums[1] != sums[1];
    if (!tally.expect(both_nan || std::memcmp(&sums[0], &sums[1], 8) == 0)) {
        std::printf("sum of squares: dtype %d, length %d differs\n", index, count);
    }
    GradientScale scale;
    scale.scale = -3.0F;
    scale.limit = 0.5F;
    scalar::kernels().scale[index](expected.data(), scale, count);
    compared_target::kernels().scale[index](compared.data(), scale, count);
    tally.compare("scale", index, compared, expected);
}

}  // namespace

int main() {
    for (int count = 0; count <= 70; ++count) {
        for (const int shift : {0, 1, 3}) {
            compare_steps<float, float>(Layout::float32, count, shift);
            compare_steps<bf16, bf16>(Layout::bfloat16, count, shift);
            compare_steps<float, bf16>(Layout::float32_bfloat16_state, count, shift);
        }
    }
    for (int count = 0; count <= 600; count += count < 70 ? 1 : 53) {
        for (const int shift : {0, 1, 3}) {
            compare_rest<float>(Dtype::float32, count, shift);
            compare_rest<bf16>(Dtype::bfloat16, count, shift);
            compare_rest<f16>(Dtype::float16, count, shift);
        }
    }
    return tally.report();
}
