// What the comparing programs share: numbers, guarded arrays, and every formula with options that reach each of its
// forms and branches.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "backend.h"

namespace lit_fast::scalar {
const CpuKernels& kernels();
}

namespace lit_fast::cases {

inline std::uint32_t random_word() {
    static std::uint64_t state = 0x9e3779b97f4a7c15U;
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::uint32_t>(state >> 32);
}

// In [-1, 1).
inline float ordinary_value() { return static_cast<float>(random_word()) / 2147483648.0F - 1.0F; }

// Mostly ordinary numbers; now and then zero, denormal, tiny, huge, infinite or NaN.
inline float any_value() {
    const float value = ordinary_value();
    switch (random_word() % 16) {
        case 0:
            return 0.0F;
        case 1:
            return -0.0F;
        case 2:
            return value * 1e-41F;
        case 3:
            return value * 3e38F;
        case 4:
            return value < 0.0F ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
        case 5:
            return std::numeric_limits<float>::quiet_NaN();
        case 6:
            return value * 1e-20F;
        default:
            return value;
    }
}

// Finite, and nothing that a square of overflows.
inline float finite_value() {
    const float value = ordinary_value();
    if (random_word() % 1024 == 0) return value * 1e15F;
    switch (random_word() % 16) {
        case 0:
            return 0.0F;
        case 1:
            return -0.0F;
        case 2:
            return value * 1e-41F;
        case 3:
            return value * 1e-20F;
        default:
            return value;
    }
}
inline float zero_value() { return random_word() % 2 == 0 ? 0.0F : -0.0F; }
// Zero, or something whose square is tiny.
inline float small_value() { return random_word() % 4 == 0 ? 0.0F : ordinary_value() * 0x1p-45F; }
inline float tiny_value() { return ordinary_value() * 0x1p-93F; }
inline float huge_value() { return ordinary_value() * 0x1.fp126F; }

template <class T>
T as(float value) {
    if constexpr (sizeof(T) == 4) {
        return value;
    } else {
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return {static_cast<std::uint16_t>(value != value ? 0x7fc0U : bits >> 16)};
    }
}

inline bool same(float a, float b) { return (a != a && b != b) || std::memcmp(&a, &b, 4) == 0; }
inline bool same(bf16 a, bf16 b) { return a.bits == b.bits; }
inline bool is_nan(f16 a) { return (a.bits & 0x7fffU) > 0x7c00U; }
inline bool same(f16 a, f16 b) { return (is_nan(a) && is_nan(b)) || a.bits == b.bits; }

constexpr int kGuard = 24;  // elements before and after that must stay as they are

// `count` elements at an offset of `shift` elements from an aligned start, with guards.
template <class T>
struct Guarded {
    std::vector<T> storage;
    int shift, count;
    Guarded(int s, int n, float (*value)()) : shift(s), count(n) {
        storage.resize(static_cast<std::size_t>(kGuard + s + n + kGuard));
        for (T& element : storage) element = as<T>(value());
    }
    T* data() { return storage.data() + kGuard + shift; }
};

struct Tally {
    long comparisons = 0, failures = 0;

    template <class T>
    void compare(const char* what, int detail, const Guarded<T>& a, const Guarded<T>& b) {
        std::size_t i = 0;
        while (i < a.storage.size() && same(a.storage[i], b.storage[i])) ++i;
        if (expect(i == a.storage.size())) return;
        std::printf("%s, case %d: length %d, shift %d: element %ld differs\n", what, detail, a.count, a.shift,
                    static_cast<long>(i) - kGuard - a.shift);
    }
    // True as well where enough failures have been described.
    bool expect(bool condition) {
        ++comparisons;
        if (!condition) ++failures;
        return condition || failures > 10;
    }
    int report() const {
        std::printf("%ld comparisons, %ld failures\n", comparisons, failures);
        return failures == 0 && comparisons > 0 ? 0 : 1;
    }
};

struct Case {
    FormulaId id;
    Options options;
    unsigned form;
    unsigned positive;  // bit k: state k is never negative
    bool counts_steps, has_remainder, measured;
    CoefficientBlock (*coefficients)(const Options&);
    CoefficientBlock (*with_squares)(const CoefficientBlock&, const double* squares);  // where it is measured

    bool has_state(int k) const { return uses(form, k); }
};

template <class Formula>
CoefficientBlock coefficient_block(const Options& options) {
    const typename Formula::Coefficients c = Formula::coefficients(options.values, options.step, options.first);
    CoefficientBlock block{};
    std::memcpy(block.bytes, &c, sizeof(c));
    return block;
}

template <class Formula>
CoefficientBlock block_with_squares(const CoefficientBlock& shared, const double* squares) {
    typename Formula::Coefficients c;
    std::memcpy(&c, shared.bytes, sizeof(c));
    c = Formula::with_squares(c, squares[0], squares[1]);
    CoefficientBlock block{};
    std::memcpy(block.bytes, &c, sizeof(c));
    return block;
}

template <class Formula>
void add(std::vector<Case>& all, FormulaId id, std::vector<double> values, bool first = false) {
    Case added{};
    added.id = id;
    for (std::size_t i = 0; i < values.size(); ++i) added.options.values[i] = values[i];
    added.options.step = first ? 1.0 : 3.0;
    added.options.first = first;
    added.form = Formula::form(added.options.values);
    added.positive = ~Formula::signed_states;
    added.counts_steps = Formula::counts_steps;
    added.has_remainder = Formula::has_remainder(added.options.values);
    added.measured = kMeasured<Formula>;
    added.coefficients = coefficient_block<Formula>;
    if constexpr (kMeasured<Formula>) added.with_squares = block_with_squares<Formula>;
    all.push_back(added);
}

inline const std::vector<Case>& all() {
    static const std::vector<Case> cases = [] {
        std::vector<Case> c;
        // lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, amsgrad
        add<AdamW>(c, FormulaId::AdamW, {1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0});
        add<AdamW>(c, FormulaId::AdamW, {1e-2, 0.9, 0.999, 1e-8, 0.1, 0, 0, 0});
        add<AdamW>(c, FormulaId::AdamW, {1e-2, 0.4, 0.95, 1e-6, 0.1, 1, 1, 0}, true);
        add<AdamW>(c, FormulaId::AdamW, {1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 0, 1});
        add<AdamW>(c, FormulaId::AdamW, {1e-2, 0.4, 0.95, 1e-6, 0.1, 0, 1, 1});
        // lr, momentum, dampening, weight_decay, nesterov, maximize, fused
        add<Sgd>(c, FormulaId::Sgd, {0.1, 0, 0, 0, 0, 0, 0});
        add<Sgd>(c, FormulaId::Sgd, {0.1, 0, 0, 0.01, 0, 1, 1});
        add<Sgd>(c, FormulaId::Sgd, {0.1, 0.9, 0.1, 0.01, 0, 1, 1});
        add<Sgd>(c, FormulaId::Sgd, {0.1, 0.9, 0, 0.01, 1, 0, 0});
        add<Sgd>(c, FormulaId::Sgd, {0.1, 0.9, 0.1, 0, 0, 0, 1}, true);
        // lr, beta1, beta2, weight_decay, maximize
        add<Lion>(c, FormulaId::Lion, {1e-2, 0.9, 0.99, 0.1, 0});
        add<Lion>(c, FormulaId::Lion, {1e-2, 0.95, 0.98, 0, 1});
        // lr, lr_decay, eps, weight_decay, maximize
        add<Adagrad>(c, FormulaId::Adagrad, {1e-2, 0, 1e-10, 0, 0});
        add<Adagrad>(c, FormulaId::Adagrad, {1e-2, 0.1, 1e-6, 0.01, 1});
        // lr, alpha, eps, weight_decay, momentum, centered, maximize
        add<RmsProp>(c, FormulaId::RmsProp, {1e-2, 0.99, 1e-8, 0, 0, 0, 0});
        add<RmsProp>(c, FormulaId::RmsProp, {1e-2, 0.99, 1e-8, 0.01, 0, 1, 1});
        add<RmsProp>(c, FormulaId::RmsProp, {1e-2, 0.9, 1e-8, 0.01, 0.9, 0, 0});
        add<RmsProp>(c, FormulaId::RmsProp, {1e-2, 0.9, 1e-6, 0, 0.9, 1, 1});
        // lr, adjusted_lr, weight_decay, momentum, nesterov, second_pass
        add<Muon>(c, FormulaId::Muon, {1e-2, 2e-2, 0.1, 0.95, 1, 0});
        add<Muon>(c, FormulaId::Muon, {1e-2, 2e-2, 0.1, 0.3, 0, 0});
        add<Muon>(c, FormulaId::Muon, {1e-2, 2e-2, 0.1, 0.3, 1, 0});
        add<Muon>(c, FormulaId::Muon, {1e-2, 2e-2, 0.1, 0, 0, 1});
        // lr, beta1, beta2, eps, weight_decay, maximize, trust_clip, always_adapt
        add<Lamb>(c, FormulaId::Lamb, {1e-2, 0.9, 0.999, 1e-6, 0.1, 0, 0, 1});
        add<Lamb>(c, FormulaId::Lamb, {1e-2, 0.4, 0.95, 1e-8, 0, 1, 1, 0}, true);
        return c;
    }();
    return cases;
}

}  // namespace lit_fast::cases
