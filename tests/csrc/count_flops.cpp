// Counts what a formula computes for one element: it runs with a number that counts its own operations.
//
// Reads lines "formula options...", writes "update direction" for each: FLOPs of the two, the gradient's scale
// included; 0 for a formula that has no direction.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>

#include "formulas/all.h"
#include "formulas/scale.h"

namespace lit_fast {

int flops = 0;

struct Counted {
    Counted() = default;
    explicit Counted(float) {}
};
Counted counted(int operations) {
    flops += operations;
    return {};
}
Counted operator+(Counted, Counted) { return counted(1); }
Counted operator-(Counted, Counted) { return counted(1); }
Counted operator*(Counted, Counted) { return counted(1); }
Counted operator/(Counted, Counted) { return counted(1); }
Counted sqrt(Counted) { return counted(1); }
Counted max(Counted, Counted) { return counted(1); }
Counted sign(Counted) { return counted(1); }
Counted clamp(Counted, Counted, Counted) { return counted(2); }
Counted fma(Counted, Counted, Counted) { return counted(2); }

template <class Formula, unsigned kForm>
int of_update(const typename Formula::Coefficients& c, const GradientScale& scale) {
    flops = 0;
    Counted param, state[Formula::states];
    Formula::template update<Fused::second_product, kForm>(c, param, scaled_gradient(scale, Counted()), state);
    return flops;
}

template <class Formula, int index = 0>
int of_form(unsigned form, const typename Formula::Coefficients& c, const GradientScale& scale) {
    if constexpr (index < static_cast<int>(sizeof(Formula::forms) / sizeof(Formula::forms[0]))) {
        if (Formula::forms[index] == form) return of_update<Formula, Formula::forms[index]>(c, scale);
        return of_form<Formula, index + 1>(form, c, scale);
    }
    return -1;
}

template <class Formula>
void count(const double* options) {
    const auto c = Formula::coefficients(options, 10.0, false);
    const GradientScale scale{0.5F};
    const int update = of_form<Formula>(Formula::form(options), c, scale);
    flops = 0;
    if constexpr (kMeasured<Formula>) {
        Counted state[Formula::states];
        Formula::template direction<Fused::second_product>(c, Counted(), scaled_gradient(scale, Counted()), state);
    }
    std::printf("%d %d\n", update, flops);
}

}  // namespace lit_fast

int main() {
    using namespace lit_fast;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string name;
        double options[kMaxOptions] = {};
        words >> name;
        for (int i = 0; i < kMaxOptions && words >> options[i]; ++i) {
        }
#define LIT_FAST_ENTRY(Formula) \
    if (name == Formula::name) count<Formula>(options);
        LIT_FAST_FORMULAS(LIT_FAST_ENTRY)
#undef LIT_FAST_ENTRY
    }
}
