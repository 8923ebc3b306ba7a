// AdamW, and Adam with L2 decay, in the order of operations of torch 2.13's fused CPU kernel.
//
//     decoupled decay:  p <- p * (1 - lr * weight_decay)            L2 decay:  g <- g + weight_decay * p
//     exp_avg    <- exp_avg + (1 - beta1) * (g - exp_avg)
//     exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g^2
//     p <- p - lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^t) + eps)
// With amsgrad the root is taken of max_exp_avg_sq <- max(max_exp_avg_sq, exp_avg_sq).
//
// Kingma & Ba, "Adam", 2015 (arXiv:1412.6980); Loshchilov & Hutter, "Decoupled weight decay regularization", 2019
// (arXiv:1711.05101); Reddi, Kale & Kumar, "On the convergence of Adam and beyond", 2018 (arXiv:1904.09237).
#pragma once

#include <cmath>

#include "math.h"

namespace lit_fast {

struct AdamW {
    static constexpr const char* name = "adamw";
    enum Option { lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, amsgrad, option_count };
    static constexpr const char* option_names[] = {
        "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "amsgrad"};
    static constexpr const char* state_names[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
    static constexpr int states = 3;
    static constexpr unsigned signed_states = 0b001;
    static constexpr unsigned forms[] = {0b011, 0b011 | kGeneral, 0b111 | kGeneral};
    static constexpr bool counts_steps = true;

    struct Coefficients {
        float parameter_decay;  // 1 - lr * weight_decay when decoupled, else 1
        float l2_decay;         // weight_decay when not decoupled, else 0
        float gradient_sign;    // -1 to maximize; whoever scales the gradient multiplies by it
        float one_minus_beta1, beta2, one_minus_beta2;
        float negative_step_size;  // -lr / (1 - beta1^t)
        Divisor bias_correction2_sqrt;
        float eps;
    };

    static unsigned form(const double* options) {
        if (options[amsgrad] != 0.0) return 0b111 | kGeneral;
        const bool l2 = options[decoupled_weight_decay] == 0.0 && options[weight_decay] != 0.0;
        return l2 || options[beta1] <= 0.5 ? 0b011 | kGeneral : 0b011;
    }

    // torch's remainder loop fuses the other product, always.
    static bool has_remainder(const double*) { return true; }

    // step: this step's number, from 1.
    LIT_FAST_INLINE static Coefficients coefficients(const double* options, double step, bool /*first*/) {
        const bool decoupled = options[decoupled_weight_decay] != 0.0;
        const double step_size = options[lr] / (1.0 - std::pow(options[beta1], step));
        Coefficients c;
        c.parameter_decay = decoupled ? static_cast<float>(std::fma(-options[lr], options[weight_decay], 1.0)) : 1.0F;
        c.l2_decay = decoupled ? 0.0F : static_cast<float>(options[weight_decay]);
        c.gradient_sign = options[maximize] != 0.0 ? -1.0F : 1.0F;
        c.one_minus_beta1 = static_cast<float>(1.0 - options[beta1]);
        c.beta2 = static_cast<float>(options[beta2]);
        c.one_minus_beta2 = static_cast<float>(1.0 - options[beta2]);
        c.negative_step_size = static_cast<float>(-step_size);
        c.bias_correction2_sqrt = Divisor(std::sqrt(1.0 - std::pow(options[beta2], step)));
        c.eps = static_cast<float>(options[eps]);
        return c;
    }

    template <Fused kFused, unsigned kForm, class V>
    LIT_FAST_INLINE static void update(const Coefficients& c, V& param, V grad, V (&state)[states]) {
        V& exp_avg = state[0];
        V& exp_avg_sq = state[1];
        param = param * V(c.parameter_decay);
        if constexpr ((kForm & kGeneral) != 0) {
            if (c.l2_decay != 0.0F) grad = fma(param, V(c.l2_decay), grad);
        }
        // torch's lerp starts from the nearer end.
        if ((kForm & kGeneral) == 0 || c.one_minus_beta1 < 0.5F) {
            exp_avg = fma(V(c.one_minus_beta1), grad - exp_avg, exp_avg);
        } else {
            exp_avg = fma(V(c.one_minus_beta1 - 1.0F), grad - exp_avg, grad);
        }
        exp_avg_sq = sum_of_products<kFused>(exp_avg_sq, V(c.beta2), V(c.one_minus_beta2) * grad, grad);
        V root_of = exp_avg_sq;
        if constexpr (uses(kForm, 2)) root_of = state[2] = max(state[2], exp_avg_sq);
        const V denominator = quotient(sqrt(root_of), c.bias_correction2_sqrt) + V(c.eps);
        param = param + V(c.negative_step_size) * exp_avg / denominator;
    }
};

}  // namespace lit_fast
