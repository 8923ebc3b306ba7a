// Runs every loop over flat memory of one CPU target and of the scalar reference on the same inputs and compares bits:
// lengths around a vector and a block, misaligned starts, special values, every pair of dtypes, in place. Built and run
// by test_targets_elsewhere.py.
#include "cases.h"

namespace lit_fast::scalar {
const BucketKernels& bucket_kernels();
}
namespace lit_fast::compared_target {
const BucketKernels& bucket_kernels();
}

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

Tally tally;

template <class T>
constexpr int kIndex = std::is_same_v<T, float>  ? 0
                       : std::is_same_v<T, bf16> ? 1
                                                 : 2;

template <class In, class Out>
void compare_pair(int count, int shift) {
    constexpr int kCase = 10 * kIndex<In> + kIndex<Out>;
    constexpr float kScale = 0.37F;
    const BucketKernels &reference = scalar::bucket_kernels(), &compared = compared_target::bucket_kernels();
    Guarded<In> grad(shift, count, any_value), aside(shift, count, any_value), pieces(shift, 3 * count, any_value);
    Guarded<Out> expected(shift, count, any_value);
    const auto twice = [&](const char* what, const auto& run) {
        Guarded<Out> one = expected, other = expected;
        run(reference, one);
        run(compared, other);
        tally.compare(what, kCase, other, one);
    };
    for (const bool with_aside : {false, true}) {
        twice("pack", [&](const BucketKernels& kernels, Guarded<Out>& out) {
            kernels.pack[kIndex<In>][kIndex<Out>](grad.data(), with_aside ? aside.data() : nullptr, out.data(), kScale,
                                                  count);
        });
        if constexpr (std::is_same_v<In, Out>) {
            twice("pack in place", [&](const BucketKernels& kernels, Guarded<Out>& out) {
                kernels.pack[kIndex<In>][kIndex<Out>](out.data(), with_aside ? aside.data() : nullptr, out.data(),
                                                      kScale, count);
            });
        }
    }
    for (const int rows : {1, 3}) {
        twice("sum", [&](const BucketKernels& kernels, Guarded<Out>& out) {
            kernels.sum[kIndex<In>][kIndex<Out>](pieces.data(), count, rows, out.data(), kScale, count);
        });
    }
}

template <class In>
void compare_all(int count, int shift) {
    compare_pair<In, float>(count, shift);
    compare_pair<In, bf16>(count, shift);
    compare_pair<In, f16>(count, shift);
}

}  // namespace

int main() {
    for (int count = 0; count <= 600; count += count < 40 ? 1 : 53) {
        for (const int shift : {0, 1, 3}) {
            compare_all<float>(count, shift);
            compare_all<bf16>(count, shift);
            compare_all<f16>(count, shift);
        }
    }
    return tally.report();
}
