// Adagrad, as torch writes it.
//
//     g <- g + weight_decay * p
//     sum <- sum + g^2
//     p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)
//
// Duchi, Hazan & Singer, "Adaptive subgradient methods for online learning and stochastic optimization", 2011.
#pragma once

#include "math.h"

namespace lit_fast {

struct Adagrad {
    static constexpr const char* name = "adagrad";
    enum Option { lr, lr_decay, eps, weight_decay, maximize, option_count };
    static constexpr const char* option_names[] = {"lr", "lr_decay", "eps", "weight_decay", "maximize"};
    static constexpr const char* state_names[] = {"sum"};
    static constexpr int states = 1;
    static constexpr unsigned signed_states = 0b0;
    static constexpr unsigned forms[] = {0b1 | kGeneral};
    static constexpr bool counts_steps = true;

    struct Coefficients {
        float negative_lr, eps, weight_decay;
        float gradient_sign;  // -1 to maximize; whoever scales the gradient multiplies by it
    };

    static unsigned form(const double*) { return 0b1 | kGeneral; }
    static bool has_remainder(const double*) { return false; }

    LIT_FAST_INLINE static Coefficients coefficients(const double* options, double step, bool /*first*/) {
        Coefficients c;
        c.negative_lr = static_cast<float>(-options[lr] / (1.0 + (step - 1.0) * options[lr_decay]));
        c.eps = static_cast<float>(options[eps]);
        c.weight_decay = static_cast<float>(options[weight_decay]);
        c.gradient_sign = options[maximize] != 0.0 ? -1.0F : 1.0F;
        return c;
    }

    template <Fused kFused, unsigned kForm, class V>
    LIT_FAST_INLINE static void update(const Coefficients& c, V& param, V grad, V (&state)[states]) {
        V& sum = state[0];
        if (c.weight_decay != 0.0F) grad = fma(param, V(c.weight_decay), grad);
        sum = fma(grad, grad, sum);
        param = param + V(c.negative_lr) * grad / (sqrt(sum) + V(c.eps));
    }
};

}  // namespace lit_fast
