// SGD with weight decay, momentum, dampening and Nesterov momentum, in torch's order of operations.
//
//     g <- g + weight_decay * p
//     buffer <- momentum * buffer + (1 - dampening) * g      (the first time: buffer <- g)
//     g <- g + momentum * buffer   with Nesterov,   g <- buffer   without
//     p <- p - lr * g
//
// Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, as torch writes it.
#pragma once

#include "math.h"

namespace lit_fast {

struct Sgd {
    static constexpr const char* name = "sgd";
    enum Option { lr, momentum, dampening, weight_decay, nesterov, maximize, fused, option_count };
    static constexpr const char* option_names[] = {"lr",       "momentum", "dampening", "weight_decay",
                                                   "nesterov", "maximize", "fused"};
    static constexpr const char* state_names[] = {"momentum_buffer"};
    static constexpr int states = 1;
    static constexpr unsigned signed_states = 0b1;
    static constexpr unsigned forms[] = {0b0 | kGeneral, 0b1 | kGeneral};
    static constexpr bool counts_steps = false;

    struct Coefficients {
        float negative_lr, momentum, one_minus_dampening, weight_decay;
        float gradient_sign;  // -1 to maximize; whoever scales the gradient multiplies by it
        bool nesterov, first;
    };

    static unsigned form(const double* options) { return kGeneral | (options[momentum] == 0.0 ? 0b0U : 0b1U); }

    // torch's SGD(fused=True) ends in a scalar loop of the other order; its default is one FMA everywhere.
    static bool has_remainder(const double* options) { return options[fused] != 0.0; }

    // first: the momentum buffer is new and holds nothing yet.
    LIT_FAST_INLINE static Coefficients coefficients(const double* options, double /*step*/, bool first) {
        Coefficients c;
        c.negative_lr = static_cast<float>(-options[lr]);
        c.momentum = static_cast<float>(options[momentum]);
        c.one_minus_dampening = static_cast<float>(1.0 - options[dampening]);
        c.weight_decay = static_cast<float>(options[weight_decay]);
        c.gradient_sign = options[maximize] != 0.0 ? -1.0F : 1.0F;
        c.nesterov = options[nesterov] != 0.0;
        c.first = first;
        return c;
    }

    template <Fused kFused, unsigned kForm, class V>
    LIT_FAST_INLINE static void update(const Coefficients& c, V& param, V grad, V (&state)[states]) {
        V& buffer = state[0];
        if (c.weight_decay != 0.0F) grad = fma(param, V(c.weight_decay), grad);
        if constexpr (uses(kForm, 0)) {
            buffer = c.first ? grad : sum_of_products<kFused>(buffer, V(c.momentum), grad, V(c.one_minus_dampening));
            grad = c.nesterov ? fma(buffer, V(c.momentum), grad) : buffer;
        }
        param = fma(grad, V(c.negative_lr), param);
    }
};

}  // namespace lit_fast
