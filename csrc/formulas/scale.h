// Gradient scale and clip, folded into every step and available on its own.
//
//     g <- clamp(g * scale, -limit, +limit)
//
// To maximize, a step takes -scale: a product's sign costs nothing.
//
// scale is the product of the inverse loss scale and the clip coefficient min(1, max_norm / (norm + 1e-6)) of
// torch.nn.utils.clip_grad_norm_; limit is clip_grad_value_'s, infinite when there is none. Multiplying by 1
// changes no bit, so it needs no branch.
#pragma once

#include "math.h"

namespace lit_fast {

struct GradientScale {
    float scale = 1.0F;
    float limit = __builtin_inff();
};

LIT_FAST_INLINE bool clamps(const GradientScale& s) { return s.limit < __builtin_inff(); }

template <bool kMayClamp = true, class V>
LIT_FAST_INLINE V scaled_gradient(const GradientScale& s, V grad) {
    grad = grad * V(s.scale);
    if constexpr (kMayClamp) {
        if (clamps(s)) grad = clamp(grad, V(-s.limit), V(s.limit));
    }
    return grad;
}

// norm: of the gradients after unscaling. A NaN norm gives a NaN coefficient, an infinite one zero, as torch does.
LIT_FAST_INLINE float clip_coefficient(float norm, float max_norm) {
    const float coefficient = max_norm / (norm + 1e-6F);
    return coefficient > 1.0F ? 1.0F : coefficient;
}

}  // namespace lit_fast
