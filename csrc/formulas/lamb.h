// LAMB: Adam with decay in the update, and a learning rate for each tensor by the trust ratio of two norms.
//
//     m <- beta1 m + (1 - beta1) g                m^ = m / (1 - beta1^t)
//     v <- beta2 v + (1 - beta2) g^2              v^ = v / (1 - beta2^t)
//     u  = m^ / (sqrt(v^) + eps) + weight_decay * p
//     p <- p - lr * |p| / |u| * u                 |.|: L2 norm of one tensor; the ratio is 1 where either norm is 0
// trust_clip: the ratio is 1 at most; without always_adapt it is 1 where weight_decay is 0.
//
// Two passes. The first one writes nothing: it makes u in registers and sums the squares of p and u. The second one
// makes u again, with the ratio among its coefficients, and is a step like any other formula's. Read and written in
// float32: 16 + 28 bytes an element; to store the moments in the first pass would take 24 + 16, and rounded ones where
// they are stored in fewer bits.
//
// You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", 2020 (arXiv:1904.00962),
// algorithm 2, with phi(x) = x.
#pragma once

#include <cmath>

#include "math.h"

namespace lit_fast {

struct Lamb {
    static constexpr const char* name = "lamb";
    enum Option { lr, beta1, beta2, eps, weight_decay, maximize, trust_clip, always_adapt, option_count };
    static constexpr const char* option_names[] = {"lr",           "beta1",    "beta2",      "eps",
                                                   "weight_decay", "maximize", "trust_clip", "always_adapt"};
    static constexpr const char* state_names[] = {"exp_avg", "exp_avg_sq"};
    static constexpr int states = 2;
    static constexpr unsigned signed_states = 0b01;
    static constexpr unsigned forms[] = {0b11 | kGeneral};
    static constexpr bool counts_steps = true;

    struct Coefficients {
        float gradient_sign;  // -1 to maximize; whoever scales the gradient multiplies by it
        float one_minus_beta1, beta2, one_minus_beta2;
        float inverse_bias_correction1;  // 1 / (1 - beta1^t)
        Divisor bias_correction2_sqrt;
        float eps, weight_decay;
        float negative_lr;  // times the trust ratio, in the second pass
        bool adapts, clips_ratio;
    };

    static unsigned form(const double*) { return 0b11 | kGeneral; }
    static bool has_remainder(const double*) { return false; }

    // step: this step's number, from 1.
    LIT_FAST_INLINE static Coefficients coefficients(const double* options, double step, bool /*first*/) {
        Coefficients c;
        c.gradient_sign = options[maximize] != 0.0 ? -1.0F : 1.0F;
        c.one_minus_beta1 = static_cast<float>(1.0 - options[beta1]);
        c.beta2 = static_cast<float>(options[beta2]);
        c.one_minus_beta2 = static_cast<float>(1.0 - options[beta2]);
        c.inverse_bias_correction1 = static_cast<float>(1.0 / (1.0 - std::pow(options[beta1], step)));
        c.bias_correction2_sqrt = Divisor(std::sqrt(1.0 - std::pow(options[beta2], step)));
        c.eps = static_cast<float>(options[eps]);
        c.weight_decay = static_cast<float>(options[weight_decay]);
        c.negative_lr = static_cast<float>(-options[lr]);
        c.adapts = options[always_adapt] != 0.0 || options[weight_decay] != 0.0;
        c.clips_ratio = options[trust_clip] != 0.0;
        return c;
    }

    // The coefficients of one tensor, from the sums of squares of its parameter and its direction.
    LIT_FAST_INLINE static Coefficients with_squares(Coefficients c, double param_squares, double direction_squares) {
        if (!c.adapts || !(param_squares > 0.0 && direction_squares > 0.0)) return c;
        const double ratio = std::sqrt(param_squares) / std::sqrt(direction_squares);
        if (c.clips_ratio && ratio > 1.0) return c;
        c.negative_lr = static_cast<float>(static_cast<double>(c.negative_lr) * ratio);
        return c;
    }

    // u, and the moments.
    template <Fused kFused, class V>
    LIT_FAST_INLINE static V direction(const Coefficients& c, V param, V grad, V (&state)[states]) {
        state[0] = fma(V(c.one_minus_beta1), grad - state[0], state[0]);
        state[1] = sum_of_products<kFused>(state[1], V(c.beta2), V(c.one_minus_beta2) * grad, grad);
        const V denominator = quotient(sqrt(state[1]), c.bias_correction2_sqrt) + V(c.eps);
        return fma(V(c.weight_decay), param, state[0] * V(c.inverse_bias_correction1) / denominator);
    }

    template <Fused kFused, unsigned kForm, class V>
    LIT_FAST_INLINE static void update(const Coefficients& c, V& param, V grad, V (&state)[states]) {
        param = fma(V(c.negative_lr), direction<kFused>(c, param, grad, state), param);
    }
};

}  // namespace lit_fast
