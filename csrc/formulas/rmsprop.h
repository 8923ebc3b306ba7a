// RMSprop, centered or not, with or without momentum, as torch writes it.
//
//     g <- g + weight_decay * p
//     square_avg <- alpha * square_avg + (1 - alpha) * g^2
//     grad_avg <- grad_avg + (1 - alpha) * (g - grad_avg)                         centered
//     d <- sqrt(square_avg - grad_avg^2) + eps   centered,   sqrt(square_avg) + eps   otherwise
//     momentum_buffer <- momentum * momentum_buffer + g / d,   p <- p - lr * momentum_buffer      with momentum
//     p <- p - lr * g / d                                                                          without
//
// Tieleman & Hinton, "Lecture 6.5: rmsprop", 2012; Graves, 2013 (arXiv:1308.0850) for the centered form.
#pragma once

#include "math.h"

namespace lit_fast {

struct RmsProp {
    static constexpr const char* name = "rmsprop";
    enum Option { lr, alpha, eps, weight_decay, momentum, centered, maximize, option_count };
    static constexpr const char* option_names[] = {"lr",       "alpha",    "eps",     "weight_decay",
                                                   "momentum", "centered", "maximize"};
    static constexpr const char* state_names[] = {"square_avg", "grad_avg", "momentum_buffer"};
    static constexpr int states = 3;
    static constexpr unsigned signed_states = 0b110;
    static constexpr unsigned forms[] = {0b001 | kGeneral, 0b011 | kGeneral, 0b101 | kGeneral, 0b111 | kGeneral};
    static constexpr bool counts_steps = true;

    struct Coefficients {
        float negative_lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
        float gradient_sign;  // -1 to maximize; whoever scales the gradient multiplies by it
    };

    static unsigned form(const double* options) {
        return kGeneral | 0b001U | (options[centered] != 0.0 ? 0b010U : 0U) | (options[momentum] != 0.0 ? 0b100U : 0U);
    }
    static bool has_remainder(const double*) { return false; }

    LIT_FAST_INLINE static Coefficients coefficients(const double* options, double /*step*/, bool /*first*/) {
        Coefficients c;
        c.negative_lr = static_cast<float>(-options[lr]);
        c.alpha = static_cast<float>(options[alpha]);
        c.one_minus_alpha = static_cast<float>(1.0 - options[alpha]);
        c.eps = static_cast<float>(options[eps]);
        c.weight_decay = static_cast<float>(options[weight_decay]);
        c.momentum = static_cast<float>(options[momentum]);
        c.gradient_sign = options[maximize] != 0.0 ? -1.0F : 1.0F;
        return c;
    }

    template <Fused kFused, unsigned kForm, class V>
    LIT_FAST_INLINE static void update(const Coefficients& c, V& param, V grad, V (&state)[states]) {
        V& square_avg = state[0];
        if (c.weight_decay != 0.0F) grad = fma(param, V(c.weight_decay), grad);
        square_avg = fma(V(c.one_minus_alpha) * grad, grad, V(c.alpha) * square_avg);
        V variance = square_avg;
        if constexpr (uses(kForm, 1)) {
            V& grad_avg = state[1];
            grad_avg = fma(V(c.one_minus_alpha), grad - grad_avg, grad_avg);
            variance = fma(V(-1.0F) * grad_avg, grad_avg, square_avg);
        }
        const V denominator = sqrt(variance) + V(c.eps);
        if constexpr (uses(kForm, 2)) {
            V& buffer = state[2];
            buffer = V(c.momentum) * buffer + grad / denominator;
            param = fma(V(c.negative_lr), buffer, param);
        } else {
            param = param + V(c.negative_lr) * grad / denominator;
        }
    }
};

}  // namespace lit_fast
