// Muon's two passes over memory; between them its direction is orthogonalized, by matrix products that are torch's
// (lit_fast/optim/muon.py). In the order of operations of torch.optim.Muon.
//
//     first     momentum_buffer <- momentum_buffer + (1 - momentum) * (g - momentum_buffer)
//               u <- g + momentum * (momentum_buffer - g)   with Nesterov,   u <- momentum_buffer   without
//     second    p <- p * (1 - lr * weight_decay) - adjusted_lr * o
//
// u stands in the parameter's place in the first pass, and is written only; o in the gradient's place in the second.
//
// Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon).
#pragma once

#include "math.h"

namespace lit_fast {

struct Muon {
    static constexpr const char* name = "muon";
    enum Option { lr, adjusted_lr, weight_decay, momentum, nesterov, second_pass, option_count };
    static constexpr const char* option_names[] = {"lr",       "adjusted_lr", "weight_decay",
                                                   "momentum", "nesterov",    "second_pass"};
    static constexpr const char* state_names[] = {"momentum_buffer"};
    static constexpr int states = 1;
    static constexpr unsigned signed_states = 0b1;
    static constexpr unsigned forms[] = {0b0 | kGeneral, 0b1 | kGeneral};  // the second pass, the first
    static constexpr bool counts_steps = false;

    struct Coefficients {
        float parameter_decay;  // 1 - lr * weight_decay
        float negative_lr;      // adjusted
        float gradient_sign = 1.0F;
        float momentum, one_minus_momentum;
        bool nesterov;
    };

    static unsigned form(const double* options) { return kGeneral | (options[second_pass] != 0.0 ? 0b0U : 0b1U); }
    static bool has_remainder(const double*) { return false; }

    LIT_FAST_INLINE static Coefficients coefficients(const double* options, double /*step*/, bool /*first*/) {
        Coefficients c;
        c.parameter_decay = static_cast<float>(1.0 - options[lr] * options[weight_decay]);
        c.negative_lr = static_cast<float>(-options[adjusted_lr]);
        c.momentum = static_cast<float>(options[momentum]);
        c.one_minus_momentum = static_cast<float>(1.0 - options[momentum]);
        c.nesterov = options[nesterov] != 0.0;
        return c;
    }

    template <Fused kFused, unsigned kForm, class V>
    LIT_FAST_INLINE static void update(const Coefficients& c, V& param, V grad, V (&state)[states]) {
        if constexpr (uses(kForm, 0)) {
            state[0] = lerp(state[0], grad, c.one_minus_momentum);
            param = c.nesterov ? lerp(grad, state[0], c.momentum) : state[0];
        } else {
            param = fma(grad, V(c.negative_lr), param * V(c.parameter_decay));
        }
    }

  private:
    // torch's lerp starts from the nearer end.
    template <class V>
    LIT_FAST_INLINE static V lerp(V from, V to, float weight) {
        return weight < 0.5F ? fma(V(weight), to - from, from) : fma(V(weight - 1.0F), to - from, to);
    }
};

}  // namespace lit_fast
