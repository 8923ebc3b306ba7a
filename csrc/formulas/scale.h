// Gradient scale and clip, folded into every step and available on its own.
//
//     g <- clamp(g * scale, -limit, +limit)
//
// scale is the product of the inverse loss scale and the clip coefficient min(1, max_norm / (norm + 1e-6)) of
// torch.nn.utils.clip_grad_norm_; limit is clip_grad_value_'s, infinite when there is none. Multiplying by 1 and
// clamping at infinity change no bit, so neither needs a branch.
#pragma once

#include "math.h"

namespace lit_fast {

struct GradientScale {
    float scale = 1.0F;
    float limit = __builtin_inff();
};

template <class V>
LIT_FAST_INLINE V scaled_gradient(const GradientScale& s, V grad) {
    return clamp(grad * V(s.scale), V(-s.limit), V(s.limit));
}

// norm: of the gradients after unscaling. A NaN norm gives a NaN coefficient, an infinite one zero, as torch does.
LIT_FAST_INLINE float clip_coefficient(float norm, float max_norm) {
    const float coefficient = max_norm / (norm + 1e-6F);
    return coefficient > 1.0F ? 1.0F : coefficient;
}

}  // namespace lit_fast
