// One CPU target: every loop of loops.h for the Vec of one instruction set. CMake compiles this file once per entry of
// its list, with LIT_FAST_TARGET set to the name and with that instruction set's flags.
#define LIT_FAST_STRING(x) #x
#define LIT_FAST_VEC_HEADER(target) LIT_FAST_STRING(vec_##target.h)
#define LIT_FAST_HEADER_OF(target) LIT_FAST_VEC_HEADER(target)

#include LIT_FAST_HEADER_OF(LIT_FAST_TARGET)
#include "coded.h"
#include "loops.h"
#include "measure.h"
#include "staged.h"

namespace lit_fast::LIT_FAST_TARGET {

const CpuKernels& kernels() {
#define LIT_FAST_ENTRY(Formula)                                        \
    {cpu::step<Formula, Vec, cpu::Tensors<float, float, float>>,       \
     cpu::step<Formula, BfloatVec, cpu::Tensors<bf16, bf16, bf16>>,    \
     cpu::step<Formula, Vec, cpu::Tensors<float, float, bf16>>,        \
     cpu::step<Formula, Vec, cpu::Tensors<float, bf16, float, bf16>>,  \
     cpu::step<Formula, Vec, cpu::Tensors<float, float, float, bf16>>, \
     cpu::coded_kernel<Formula, Coded, Vec>(),                         \
     cpu::step_staged<Formula, Vec>},
#define LIT_FAST_MEASURE(Formula)                                                        \
    {cpu::measure_kernel<Formula, Vec, Wide, cpu::Tensors<float, float, float>>(),       \
     cpu::measure_kernel<Formula, Vec, Wide, cpu::Tensors<bf16, bf16, bf16>>(),          \
     cpu::measure_kernel<Formula, Vec, Wide, cpu::Tensors<float, float, bf16>>(),        \
     cpu::measure_kernel<Formula, Vec, Wide, cpu::Tensors<float, bf16, float, bf16>>(),  \
     cpu::measure_kernel<Formula, Vec, Wide, cpu::Tensors<float, float, float, bf16>>(), \
     cpu::measure_kernel<Formula, Vec, Wide>(),                                          \
     cpu::measure_kernel<Formula, Vec, Wide>()},
    static constexpr CpuKernels table = {
        {LIT_FAST_FORMULAS(LIT_FAST_ENTRY)},
        {LIT_FAST_FORMULAS(LIT_FAST_MEASURE)},
        {cpu::sum_of_squares<Vec, Wide, float>, cpu::sum_of_squares<Vec, Wide, bf16>,
         cpu::sum_of_squares<Vec, Wide, f16>},
        {cpu::scale<Vec, float>, cpu::scale<Vec, bf16>, cpu::scale_staged<Vec, f16>},
    };
#undef LIT_FAST_MEASURE
#undef LIT_FAST_ENTRY
    return table;
}

}  // namespace lit_fast::LIT_FAST_TARGET
