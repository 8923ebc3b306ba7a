// A step with moments in 8-bit codes, of parameters and gradients that are both float32 or both bfloat16, a block of
// codes at a time: decoded, stepped and rounded in registers. Codes need the block's largest magnitude, so what a
// block's step gives waits in the first-level cache until it is known.
//
// Only for ordinary numbers: a block with a NaN, an infinite moment, or a scale that some code is a denormal under or
// that is no power of two (from before all were) is left to staged.h, with nothing of it written.
#pragma once

#include "../formulas/storage.h"
#include "loops.h"
#include "staged.h"

namespace lit_fast::cpu {

// Addresses of one task, as local variables. P: float or bf16.
template <class P>
struct CodedTensors {
    P* param;
    const P* grad;
    std::uint8_t* codes[kMaxStates];
    float* code_scale[kMaxStates];

    explicit CodedTensors(const StepTask& task)
        : param(static_cast<P*>(task.param)), grad(static_cast<const P*>(task.grad)) {
        for (int k = 0; k < kMaxStates; ++k) {
            codes[k] = static_cast<std::uint8_t*>(task.state[k]);
            code_scale[k] = task.code_scale[k];
        }
    }
};

// A block after its step and before its rounding, in the order of V's parts.
template <class Formula>
struct Stepped {
    alignas(64) float param[kBlock];
    alignas(64) float moments[Formula::states][kBlock];
};

// Scales whose codes have normal numbers alone: powers of two from 2^-95, and zero.
LIT_FAST_INLINE bool is_ordinary(float scale) {
    const std::uint32_t bits = bits_of(scale);
    const bool normal = (bits & 0x7fffffU) == 0 && bits >= (kUnsignedBinades + 1U) << 23 && bits <= kLargestScale;
    return normal || bits == 0;
}
// Whether a block whose largest magnitude has these bits gets such a scale, and no value above its last code.
LIT_FAST_INLINE bool is_ordinary(std::uint32_t largest) {
    const bool within = largest >= (kUnsignedBinades + 1U) << 23 && largest < kLargestScale + (1U << 23) - kDropped;
    return within || largest == 0;
}
LIT_FAST_INLINE bool all_zero(const std::uint8_t* codes) {
    std::uint8_t any = 0;
    for (int i = 0; i < kBlock; ++i) any = static_cast<std::uint8_t>(any | codes[i]);
    return any == 0;
}

template <class Formula, unsigned kForm, class Coding, int k = 0, class V>
LIT_FAST_INLINE void decode_states(V (&s)[Formula::states], const std::uint8_t* const (&codes)[Formula::states],
                                   const typename Coding::Offset (&offset)[Formula::states], int i) {
    if constexpr (k < Formula::states) {
        constexpr bool kSigned = uses(Formula::signed_states, k);
        if constexpr (uses(kForm, k)) s[k] = Coding::template decoded<kSigned>(codes[k] + i, offset[k]);
        decode_states<Formula, kForm, Coding, k + 1>(s, codes, offset, i);
    }
}

template <class Formula, unsigned kForm, int k = 0, class V, class Extremes>
LIT_FAST_INLINE void keep_states(Stepped<Formula>& stepped, const V (&s)[Formula::states],
                                 Extremes (&extremes)[Formula::states], int i) {
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) {
            s[k].store_parts(stepped.moments[k] + i);
            extremes[k].template add<uses(Formula::signed_states, k)>(s[k]);
        }
        keep_states<Formula, kForm, k + 1>(stepped, s, extremes, i);
    }
}

template <class Formula, unsigned kForm, class Coding, int k = 0>
LIT_FAST_INLINE void new_offsets(typename Coding::Offset (&offset)[Formula::states],
                                 const float (&scale)[Formula::states]) {
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) {
            offset[k] = Coding::template encode_offset<uses(Formula::signed_states, k)>(scale[k]);
        }
        new_offsets<Formula, kForm, Coding, k + 1>(offset, scale);
    }
}

template <class Formula, unsigned kForm, class Coding, int k = 0, class P>
LIT_FAST_INLINE void encode_states(const CodedTensors<P>& t, const Stepped<Formula>& stepped,
                                   const typename Coding::Offset (&offset)[Formula::states],
                                   const typename Coding::Chances& first, const typename Coding::Chances& second,
                                   std::int64_t at, int i) {
    using V = typename Coding::V;
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) {
            const float* moments = stepped.moments[k] + i;
            Coding::template store_codes<uses(Formula::signed_states, k), k>(
                t.codes[k] + at + i, V::load_parts(moments), V::load_parts(moments + V::lanes), offset[k], first,
                second);
        }
        encode_states<Formula, kForm, Coding, k + 1>(t, stepped, offset, first, second, at, i);
    }
}

template <class Formula, unsigned kForm, class Coding, int k = 0, class P>
LIT_FAST_INLINE bool find_codes(const CodedTensors<P>& t, const std::uint8_t* (&codes)[Formula::states],
                                typename Coding::Offset (&offset)[Formula::states], std::int64_t at) {
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) {
            const float scale = t.code_scale[k][at / kBlock];
            codes[k] = t.codes[k] + at;
            // Under a scale of zero other codes would be zeros with signs.
            if (!is_ordinary(scale) || (scale == 0.0F && !all_zero(codes[k]))) return false;
            offset[k] = Coding::template decode_offset<uses(Formula::signed_states, k)>(scale);
        }
        return find_codes<Formula, kForm, Coding, k + 1>(t, codes, offset, at);
    }
    return true;
}

template <bool kStochastic, class Coding, class P>
LIT_FAST_INLINE void store_param(P* to, typename Coding::V p, const typename Coding::Chances& chances) {
    if constexpr (kStochastic) {
        Coding::store_by_chance(to, p, chances);
    } else {
        store(to, p);
    }
}

template <int kElements, class T>
LIT_FAST_INLINE void prefetch_lines(const T* p) {
    for (int i = 0; i < kElements; i += 64 / static_cast<int>(sizeof(T))) prefetch_line(p + i);
}

// False, with nothing written, where something is not an ordinary number. A function of its own: beside the call of the
// staged step its loops are a fifth slower.
template <class Formula, unsigned kForm, bool kStochastic, class Coding, class P>
LIT_FAST_OWN bool step_block(const typename Formula::Coefficients& coefficients, const GradientScale& scale_at,
                             const CodedTensors<P>& tensors, std::int64_t at, std::uint32_t index, RandomKey key) {
    using V = typename Coding::V;
    using Chances = typename Coding::Chances;
    constexpr bool kMayClamp = (kForm & kGeneral) != 0;
    constexpr int kTwo = 2 * V::lanes;
    const typename Formula::Coefficients c = coefficients;
    const GradientScale scale = scale_at;
    const CodedTensors<P> t = tensors;
    const std::uint8_t* codes[Formula::states];
    typename Coding::Offset offset[Formula::states];
    if (__builtin_expect(!find_codes<Formula, kForm, Coding>(t, codes, offset, at), 0)) return false;
    Stepped<Formula> stepped;
    typename Coding::Extremes extremes[Formula::states];
    typename Coding::Numbers numbers;
    for (int two = 0; two < kBlock; two += kTwo) {
        prefetch_lines<kTwo>(t.param + at + two);
        prefetch_lines<kTwo>(t.grad + at + two);
        LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) prefetch_line(t.codes[k] + at + two);
        }
        LIT_FAST_UNROLL for (int i = two; i < two + kTwo; i += V::lanes) {
            V p = V::load(t.param + at + i);
            const V g = scaled_gradient<kMayClamp>(scale, V::load(t.grad + at + i));
            V s[Formula::states];
            decode_states<Formula, kForm, Coding>(s, codes, offset, i);
            Formula::template update<Fused::second_product, kForm>(c, p, g, s);
            keep_states<Formula, kForm>(stepped, s, extremes, i);
            numbers.add(p);
            p.store_parts(stepped.param + i);
        }
    }
    float new_scale[Formula::states];
    bool ordinary = numbers.all();
    LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
        if (uses(kForm, k)) {
            const std::uint32_t largest = extremes[k].largest();
            ordinary = ordinary && is_ordinary(largest);
            new_scale[k] = scale_of(largest);
        }
    }
    if (__builtin_expect(!ordinary, 0)) return false;
    LIT_FAST_UNROLL for (int k = 0; k < Formula::states; ++k) {
        if (uses(kForm, k)) t.code_scale[k][at / kBlock] = new_scale[k];
    }
    new_offsets<Formula, kForm, Coding>(offset, new_scale);
    typename Coding::Dice dice(index, key);
    for (int i = 0; i < kBlock; i += kTwo) {
        const Chances first = dice.next(), second = dice.next();
        encode_states<Formula, kForm, Coding>(t, stepped, offset, first, second, at, i);
        store_param<kStochastic, Coding>(t.param + at + i, V::load_parts(stepped.param + i), first);
        store_param<kStochastic, Coding>(t.param + at + i + V::lanes, V::load_parts(stepped.param + i + V::lanes),
                                         second);
    }
    return true;
}

template <class Formula, unsigned kForm, class P, bool kStochastic, class Coding, class Half>
LIT_FAST_INLINE void step_blocks(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale_at,
                                 std::int64_t begin, std::int64_t end) {
    const typename Formula::Coefficients c = coefficients_of<Formula>(block);
    const GradientScale scale = signed_scale(scale_at, c);
    const CodedTensors<P> t(task);
    const std::uint64_t first = task.first_index, seed = task.seed, number = task.step_number;
    RandomKey key = random_key(seed, number, first + static_cast<std::uint64_t>(begin));
    for (std::int64_t at = begin; at < end; at += kBlock) {
        const std::uint64_t index = first + static_cast<std::uint64_t>(at);
        if (static_cast<std::uint32_t>(index) == 0) key = random_key(seed, number, index);
        if (!step_block<Formula, kForm, kStochastic, Coding>(c, scale, t, at, static_cast<std::uint32_t>(index), key)) {
            step_staged<Formula, Half>(task, block, scale_at, at, at + kBlock);
        }
    }
}

// begin is a multiple of kBlock. What is no whole block, and torch's remainder with its order, are staged.
template <class Formula, class Coding, class Half>
void step_coded(const StepTask& task, const CoefficientBlock& block, const GradientScale& scale, std::int64_t begin,
                std::int64_t end) {
    const std::int64_t body = end < task.body ? end : task.body;
    const std::int64_t split = body > begin ? begin + (body - begin) / kBlock * kBlock : begin;
    for_form<Formula>(clamps(scale) ? task.form | kGeneral : task.form, [&](auto form) {
        if (task.storage.param == Dtype::float32) {
            step_blocks<Formula, form.value, float, false, Coding, Half>(task, block, scale, begin, split);
        } else if (task.storage.stochastic) {
            step_blocks<Formula, form.value, bf16, true, Coding, Half>(task, block, scale, begin, split);
        } else {
            step_blocks<Formula, form.value, bf16, false, Coding, Half>(task, block, scale, begin, split);
        }
    });
    if (split < end) step_staged<Formula, Half>(task, block, scale, split, end);
}

// Coding: a target's registers of codes; void for one that has none.
template <class Formula, class Coding, class Half>
constexpr StepKernel coded_kernel() {
    if constexpr (std::is_void_v<Coding>) {
        return step_staged<Formula, Half>;
    } else {
        return step_coded<Formula, Coding, Half>;
    }
}

}  // namespace lit_fast::cpu
