// Counting steps in a float32, as torch's optimizers do.
#pragma once

#include "../dtypes.h"
#include "math.h"

namespace lit_fast {

// Whether a step draws random bits, which depend on its number (storage.h).
LIT_FAST_INLINE constexpr bool draws(const Storage& s) { return s.stochastic || s.state == Dtype::uint8; }

// A float32 counts to 2^24, and there torch's optimizers stay: every later step is the 2^24th, of which no usual beta
// leaves a bias. Steps that draw random bits would draw the same for ever, so they go back to 2^23, from where the bits
// come again after eight million steps.
LIT_FAST_INLINE float next_step(float count, bool drawing) {
    return drawing && count >= 0x1p24F ? 0x1p23F + 1.0F : count + 1.0F;
}

}  // namespace lit_fast
