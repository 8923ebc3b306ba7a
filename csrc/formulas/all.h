// Every formula, once. Adding an optimizer is a header beside this one and a line in each of the two lists.
#pragma once

#include "adagrad.h"
#include "adamw.h"
#include "lamb.h"
#include "lion.h"
#include "muon.h"
#include "rmsprop.h"
#include "sgd.h"

#define LIT_FAST_FORMULAS(X) \
    X(AdamW)                 \
    X(Sgd)                   \
    X(Lion)                  \
    X(Adagrad)               \
    X(RmsProp)               \
    X(Muon)                  \
    X(Lamb)

namespace lit_fast {

enum class FormulaId : int {
#define LIT_FAST_ENTRY(Formula) Formula,
    LIT_FAST_FORMULAS(LIT_FAST_ENTRY)
#undef LIT_FAST_ENTRY
        count
};
constexpr int kFormulaCount = static_cast<int>(FormulaId::count);
constexpr int kMaxStates = 3;
constexpr int kMaxOptions = 8;

// Room for any formula's Coefficients, so that tables need no template.
struct alignas(8) CoefficientBlock {
    unsigned char bytes[48];
};

#define LIT_FAST_ENTRY(Formula)                                               \
    static_assert(sizeof(Formula::Coefficients) <= sizeof(CoefficientBlock)); \
    static_assert(Formula::states <= kMaxStates);                             \
    static_assert(Formula::option_count <= kMaxOptions);
LIT_FAST_FORMULAS(LIT_FAST_ENTRY)
#undef LIT_FAST_ENTRY

}  // namespace lit_fast
