// The step kernels of one formula and the measuring ones of another, for test_cuda_machine_code.py to compile and look
// at.
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/measure.cuh"

namespace lit_fast::cuda {

constexpr unsigned kMoments = 0b011 | kGeneral;
#define LIT_FAST_TABLES const __grid_constant__ StepTable, const __grid_constant__ DeviceScale
template __global__ void direct_kernel<AdamW, kMoments, float, float, false>(LIT_FAST_TABLES);
template __global__ void direct_kernel<AdamW, kMoments, bf16, bf16, false>(LIT_FAST_TABLES);
template __global__ void direct_kernel<AdamW, kMoments, float, bf16, false>(LIT_FAST_TABLES);
template __global__ void direct_kernel<AdamW, kMoments, bf16, float, true>(LIT_FAST_TABLES);
template __global__ void staged_kernel<AdamW, kMoments>(LIT_FAST_TABLES);

#define LIT_FAST_MEASURE(layout)                                                     \
    template __global__ void measure_kernel<Lamb, kMoments, layout>(LIT_FAST_TABLES, \
                                                                    const __grid_constant__ Measurement);
LIT_FAST_MEASURE(Layout::float32)
LIT_FAST_MEASURE(Layout::bfloat16)
LIT_FAST_MEASURE(Layout::float32_bfloat16_state)
LIT_FAST_MEASURE(Layout::bfloat16_master)
LIT_FAST_MEASURE(Layout::staged)

}  // namespace lit_fast::cuda
