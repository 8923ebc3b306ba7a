// Runs the staged steps of one CPU target, built with the flags that are shipped, which make vector code of their
// loops, against the definition written out an element at a time: widen, step as float32, narrow. Every storage that
// there is, every formula, lengths around a block's, misaligned starts, special values, and chunks that begin anywhere.
#include <cstdlib>

#include "cases.h"
#include "formulas/storage.h"

namespace lit_fast::compared_target {
const CpuKernels& kernels();
}

namespace {

using namespace lit_fast;
using namespace lit_fast::cases;

Tally tally;

std::vector<Storage> every_storage() {
    std::vector<Storage> found;
    for (const Dtype param : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        for (const Dtype grad : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
            for (const Dtype state : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::uint8}) {
                for (const Master master : {Master::none, Master::float32, Master::remainder}) {
                    for (const bool stochastic : {false, true}) {
                        const Storage s{param, grad, state, master, stochastic};
                        if (impossible(s) == nullptr) found.push_back(s);
                    }
                }
            }
        }
    }
    return found;
}

// Elements of one dtype between guards, as bytes.
struct Bytes {
    Dtype dtype;
    std::int64_t begin;  // in elements
    std::vector<unsigned char> bytes;

    Bytes(Dtype d, int shift, int count) : dtype(d), begin(kGuard + shift) {
        bytes.resize(static_cast<std::size_t>((begin + count + kGuard) * bytes_of(d)), 0xa5);
    }
    void* data() { return bytes.data() + begin * bytes_of(dtype); }
    template <class T>
    T& at(int i) {
        return static_cast<T*>(data())[i];
    }
    float value(int i) {
        return dtype == Dtype::float32    ? at<float>(i)
               : dtype == Dtype::bfloat16 ? widen(at<bf16>(i))
                                          : widen(at<f16>(i));
    }
    void round(int i, float x) {
        if (dtype == Dtype::float32) at<float>(i) = x;
        if (dtype == Dtype::bfloat16) at<bf16>(i) = nearest_bf16(x);
        if (dtype == Dtype::float16) at<f16>(i) = nearest_f16(x);
    }
};

struct Tensors {
    const Case* formula;
    Storage storage;
    int count;
    Bytes param, grad, master;
    std::vector<Bytes> state;
    std::vector<std::vector<float>> scales;

    static Dtype dtype_of(Master master) { return master == Master::remainder ? Dtype::int16 : Dtype::float32; }

    Tensors(const Case& c, const Storage& s, int n, int shift, float (*value)())
        : formula(&c),
          storage(s),
          count(n),
          param(s.param, shift, n),
          grad(s.grad, shift, n),
          master(dtype_of(s.master), shift, s.master == Master::none ? 0 : n) {
        for (int k = 0; k < kMaxStates; ++k) {
            state.emplace_back(s.state, shift, c.has_state(k) ? n : 0);
            scales.emplace_back(c.has_state(k) && s.state == Dtype::uint8 ? (n + kCodeBlock - 1) / kCodeBlock : 0);
            // Mostly what a step leaves, else what only somebody else could have put there.
            for (float& scale : scales.back()) {
                scale = __builtin_fabsf(value());
                if (random_word() % 4 != 0) scale = scale_of(bits_of(scale));
            }
        }
        for (int i = 0; i < n; ++i) {
            param.round(i, value());
            grad.round(i, value());
            if (s.master == Master::float32) master.at<float>(i) = value();
            if (s.master == Master::remainder) master.at<std::int16_t>(i) = static_cast<std::int16_t>(random_word());
            for (int k = 0; k < kMaxStates; ++k) {
                if (!c.has_state(k)) continue;
                const float x = uses(c.positive, k) ? __builtin_fabsf(value()) : value();
                Bytes& to = state[static_cast<std::size_t>(k)];
                if (s.state == Dtype::uint8) {
                    // Of the blocks whose scale is zero every other one is as a step leaves it.
                    const int block = i / kCodeBlock;
                    const bool zero = scales[static_cast<std::size_t>(k)][static_cast<std::size_t>(block)] == 0.0F;
                    to.at<std::uint8_t>(i) = zero && block % 2 == 0 ? 0 : static_cast<std::uint8_t>(random_word());
                } else {
                    to.round(i, x);
                }
            }
        }
    }

    StepTask task() {
        StepTask t;
        t.param = param.data();
        t.grad = grad.data();
        if (storage.master != Master::none) t.master = master.data();
        for (std::size_t k = 0; k < kMaxStates; ++k) {
            if (!formula->has_state(static_cast<int>(k))) continue;
            t.state[k] = state[k].data();
            if (storage.state == Dtype::uint8) t.code_scale[k] = scales[k].data();
        }
        t.numel = count;
        t.body = formula->has_remainder ? count - count % 8 : count;
        t.first_index = 0xffffff00U;  // the second block has another upper half
        t.seed = 0x123456789abcdefU;
        t.step_number = 3;
        t.form = formula->form;
        t.storage = storage;
        return t;
    }

    // Another machine's NaN has another sign and payload, so a code's sign beside a NaN scale counts for nothing.
    bool same_state(std::size_t k, Tensors& other) {
        if (state[k].dtype != Dtype::uint8) return same_bytes(state[k], other.state[k]);
        bool all = true;
        for (int i = 0; i < (scales[k].empty() ? 0 : count); ++i) {
            const float a = scales[k][static_cast<std::size_t>(i / kCodeBlock)];
            const float b = other.scales[k][static_cast<std::size_t>(i / kCodeBlock)];
            all = all && same(a, b);
            if (a == a) all = all && state[k].at<std::uint8_t>(i) == other.state[k].at<std::uint8_t>(i);
        }
        return all;
    }
    static bool same_bytes(const Bytes& a, const Bytes& b) {
        if (a.bytes == b.bytes) return true;
        const auto differs = [&](auto zero) {
            using T = decltype(zero);
            for (std::size_t i = 0; i < a.bytes.size() / sizeof(T); ++i) {
                T x, y;
                std::memcpy(&x, a.bytes.data() + i * sizeof(T), sizeof(T));
                std::memcpy(&y, b.bytes.data() + i * sizeof(T), sizeof(T));
                if (!same(x, y)) return true;
            }
            return false;
        };
        return a.dtype == Dtype::float32 ? !differs(0.0F) : a.dtype == Dtype::float16 ? !differs(f16{}) : false;
    }
    void compare(Tensors& other, const char* what, int which, int shift) {
        bool all = same_bytes(param, other.param) && same_bytes(grad, other.grad) && same_bytes(master, other.master);
        for (std::size_t k = 0; k < state.size(); ++k) all = all && same_state(k, other);
        if (tally.expect(all)) return;
        std::printf("%s, case %d: param %d, grad %d, state %d, master %d, stochastic %d, length %d, shift %d differs\n",
                    what, which, static_cast<int>(storage.param), static_cast<int>(storage.grad),
                    static_cast<int>(storage.state), static_cast<int>(storage.master), storage.stochastic, count,
                    shift);
    }
};

GradientScale scale_for(int count) {
    GradientScale scale;
    scale.scale = 0.37F;
    if (count % 3 == 0) scale.limit = 0.2F;
    return scale;
}

void step(Tensors& t, Layout layout, const std::vector<std::int64_t>& cuts) {
    const StepTask task = t.task();
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        compared_target::kernels().step[static_cast<int>(t.formula->id)][static_cast<int>(layout)](
            task, t.formula->coefficients(t.formula->options), scale_for(t.count), cuts[i], cuts[i + 1]);
    }
}

// The sums that a measured formula's step begins with.
void compare_measures(Tensors& t, int which) {
    const StepTask task = t.task();
    const auto id = static_cast<int>(t.formula->id);
    double expected[2], compared[2];
    const CoefficientBlock block = t.formula->coefficients(t.formula->options);
    const auto staged = static_cast<int>(Layout::staged), direct = static_cast<int>(layout_of(t.storage, false));
    scalar::kernels().measure[id][staged](task, block, scale_for(t.count), 0, t.count, expected);
    for (const int layout : {staged, direct}) {
        compared_target::kernels().measure[id][layout](task, block, scale_for(t.count), 0, t.count, compared);
        for (int k = 0; k < 2; ++k) {
            const bool both_nan = expected[k] != expected[k] && compared[k] != compared[k];
            if (tally.expect(both_nan || std::memcmp(&expected[k], &compared[k], 8) == 0)) continue;
            std::printf("case %d, layout %d: sum of squares %d of %d elements differs\n", which, layout, k, t.count);
        }
    }
}

// What a staged step is, by the functions of formulas/storage.h alone.
void step_by_definition(Tensors& t) {
    const StepTask task = t.task();
    const auto n = static_cast<std::size_t>(t.count);
    std::vector<float> param(n), grad(n), values[kMaxStates];
    for (int i = 0; i < t.count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        param[at] = t.storage.master == Master::float32     ? t.master.at<float>(i)
                    : t.storage.master == Master::remainder ? rebuilt(t.param.at<bf16>(i), t.master.at<std::int16_t>(i))
                                                            : t.param.value(i);
        grad[at] = t.grad.value(i);
    }
    StepTask plain = task;
    plain.param = param.data();
    plain.grad = grad.data();
    for (std::size_t k = 0; k < kMaxStates; ++k) {
        if (!t.formula->has_state(static_cast<int>(k))) continue;
        for (int i = 0; i < t.count; ++i) {
            const bool is_signed = !uses(t.formula->positive, static_cast<int>(k));
            if (t.storage.state != Dtype::uint8) {
                values[k].push_back(t.state[k].value(i));
            } else {
                const auto code = t.state[k].at<std::uint8_t>(i);
                const float scale = t.scales[k][static_cast<std::size_t>(i / kCodeBlock)];
                values[k].push_back(is_signed ? decoded_signed(code, scale) : decoded_unsigned(code, scale));
            }
        }
        plain.state[k] = values[k].data();
    }
    scalar::kernels().step[static_cast<int>(t.formula->id)][static_cast<int>(Layout::float32)](
        plain, t.formula->coefficients(t.formula->options), scale_for(t.count), 0, t.count);
    for (int i = 0; i < t.count; ++i) {
        const float x = param[static_cast<std::size_t>(i)];
        const std::uint64_t index = task.first_index + static_cast<std::uint64_t>(i);
        const std::uint32_t random =
            random_bits(static_cast<std::uint32_t>(index), random_key(task.seed, task.step_number, index));
        if (t.storage.master == Master::remainder) {
            t.param.at<bf16>(i) = upper_half(x);
            t.master.at<std::int16_t>(i) = remainder_of(x);
        } else if (t.storage.master == Master::none && t.storage.stochastic && t.storage.param == Dtype::bfloat16) {
            t.param.at<bf16>(i) = stochastic_bf16(x, param_bits(random));
        } else {
            t.param.round(i, x);
        }
        if (t.storage.master == Master::float32) t.master.at<float>(i) = x;
        for (std::size_t k = 0; k < kMaxStates; ++k) {
            if (!t.formula->has_state(static_cast<int>(k))) continue;
            const float value = values[k][static_cast<std::size_t>(i)];
            const std::uint32_t chance = state_bits(random, static_cast<int>(k));
            if (t.storage.state == Dtype::uint8) {
                const int block = i / kCodeBlock * kCodeBlock;
                std::uint32_t largest = 0;
                for (int j = block; j < t.count && j < block + kCodeBlock; ++j) {
                    const std::uint32_t magnitude = bits_of(values[k][static_cast<std::size_t>(j)]) & 0x7fffffffU;
                    largest = magnitude > largest ? magnitude : largest;
                }
                const float scale = scale_of(largest), inverse = inverse_scale(scale);
                t.scales[k][static_cast<std::size_t>(i / kCodeBlock)] = scale;
                const bool is_signed = !uses(t.formula->positive, static_cast<int>(k));
                t.state[k].at<std::uint8_t>(i) =
                    is_signed ? encoded_signed(value, inverse, chance) : encoded_unsigned(value, inverse, chance);
            } else if (t.storage.stochastic && t.storage.state == Dtype::bfloat16) {
                t.state[k].at<bf16>(i) = stochastic_bf16(value, chance >> 4);
            } else {
                t.state[k].round(i, value);
            }
        }
    }
}

void compare_one(int which, const Storage& storage, int count, int shift, float (*value)()) {
    const Case& formula = all()[static_cast<std::size_t>(which)];
    const Layout layout = layout_of(storage, false);
    Tensors expected(formula, storage, count, shift, value);
    Tensors whole = expected, direct = expected, cut = expected;
    if (formula.measured) compare_measures(whole, which);
    step_by_definition(expected);
    step(whole, Layout::staged, {0, count});
    whole.compare(expected, "definition", which, shift);
    if (layout != Layout::staged) {
        step(direct, layout, {0, count});
        direct.compare(expected, "direct", which, shift);
    }
    if (count <= kCodeBlock) return;
    const std::int64_t last = (count - 1) / kCodeBlock * kCodeBlock;
    step(cut, layout,
         last > kCodeBlock ? std::vector<std::int64_t>{0, kCodeBlock, last, count}
                           : std::vector<std::int64_t>{0, kCodeBlock, count});
    cut.compare(expected, "chunks", which, shift);
}

}  // namespace

// An argument N: every Nth length only, where an emulation is slow.
int main(int argc, char** argv) {
    const std::size_t every = argc > 1 ? static_cast<std::size_t>(std::atoi(argv[1])) : 1;
    std::vector<int> lengths = {255, 256, 257, 512, 513, 1100};
    for (int count = 0; count <= 70; ++count) lengths.push_back(count);
    const std::vector<Storage> storages = every_storage();
    tally.expect(storages.size() == 74);
    std::size_t turn = 0;
    const auto compare = [&](int which, const Storage& storage, int count, float (*value)()) {
        if (turn++ % every == 0) compare_one(which, storage, count, static_cast<int>(turn * 7 / 3 % 4), value);
    };
    for (int which = 0; which < static_cast<int>(all().size()); ++which) {
        for (const Storage& storage : storages) {
            for (const int count : lengths) {
                // A block with an infinite or NaN value has codes of no use: ordinary values every other time.
                compare(which, storage, count, count % 2 == 0 ? any_value : ordinary_value);
            }
            if (layout_of(storage, false) != Layout::codes) continue;
            // Whole blocks of numbers, which have a kernel of their own: with a limit for gradients and without.
            for (float (*value)() : {ordinary_value, finite_value, zero_value, small_value, tiny_value, huge_value}) {
                for (const int count : {2048, 2049}) compare(which, storage, count, value);
            }
        }
    }
    return tally.report();
}
