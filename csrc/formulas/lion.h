// Lion: the sign of an interpolated momentum.
//
//     p <- p * (1 - lr * weight_decay)
//     p <- p - lr * sign(beta1 * exp_avg + (1 - beta1) * g)
//     exp_avg <- beta2 * exp_avg + (1 - beta2) * g
//
// Chen et al., "Symbolic discovery of optimization algorithms", 2023 (arXiv:2302.06675), algorithm 2.
#pragma once

#include <cmath>

#include "math.h"

namespace lit_fast {

struct Lion {
    static constexpr const char* name = "lion";
    enum Option { lr, beta1, beta2, weight_decay, maximize, option_count };
    static constexpr const char* option_names[] = {"lr", "beta1", "beta2", "weight_decay", "maximize"};
    static constexpr const char* state_names[] = {"exp_avg"};
    static constexpr int states = 1;
    static constexpr unsigned signed_states = 0b1;
    static constexpr unsigned forms[] = {0b1, 0b1 | kGeneral};
    static constexpr bool counts_steps = true;

    struct Coefficients {
        float parameter_decay, negative_lr;
        float gradient_sign;  // -1 to maximize; whoever scales the gradient multiplies by it
        float beta1, one_minus_beta1, beta2, one_minus_beta2;
    };

    static unsigned form(const double*) { return 0b1; }
    static bool has_remainder(const double*) { return false; }

    LIT_FAST_INLINE static Coefficients coefficients(const double* options, double /*step*/, bool /*first*/) {
        Coefficients c;
        c.parameter_decay = static_cast<float>(std::fma(-options[lr], options[weight_decay], 1.0));
        c.negative_lr = static_cast<float>(-options[lr]);
        c.gradient_sign = options[maximize] != 0.0 ? -1.0F : 1.0F;
        c.beta1 = static_cast<float>(options[beta1]);
        c.one_minus_beta1 = static_cast<float>(1.0 - options[beta1]);
        c.beta2 = static_cast<float>(options[beta2]);
        c.one_minus_beta2 = static_cast<float>(1.0 - options[beta2]);
        return c;
    }

    template <Fused kFused, unsigned kForm, class V>
    LIT_FAST_INLINE static void update(const Coefficients& c, V& param, V grad, V (&state)[states]) {
        V& exp_avg = state[0];
        const V direction = sign(fma(V(c.one_minus_beta1), grad, V(c.beta1) * exp_avg));
        param = fma(V(c.negative_lr), direction, param * V(c.parameter_decay));
        exp_avg = fma(V(c.one_minus_beta2), grad, V(c.beta2) * exp_avg);
    }
};

}  // namespace lit_fast
