// One CPU target's loops over flat memory. A file of its own beside target.cpp, which takes half a minute to compile.
#define LIT_FAST_STRING(x) #x
#define LIT_FAST_VEC_HEADER(target) LIT_FAST_STRING(vec_##target.h)
#define LIT_FAST_HEADER_OF(target) LIT_FAST_VEC_HEADER(target)

#include LIT_FAST_HEADER_OF(LIT_FAST_TARGET)
#include "buckets.h"

namespace lit_fast::LIT_FAST_TARGET {

const BucketKernels& bucket_kernels() {
#define LIT_FAST_ROW(kernel, In)                                                           \
    {                                                                                      \
        cpu::kernel<Vec, In, float>, cpu::kernel<Vec, In, bf16>, cpu::kernel<Vec, In, f16> \
    }
    static constexpr BucketKernels table = {
        {LIT_FAST_ROW(pack, float), LIT_FAST_ROW(pack, bf16), LIT_FAST_ROW(pack, f16)},
        {LIT_FAST_ROW(sum_pieces, float), LIT_FAST_ROW(sum_pieces, bf16), LIT_FAST_ROW(sum_pieces, f16)},
    };
#undef LIT_FAST_ROW
    return table;
}

}  // namespace lit_fast::LIT_FAST_TARGET
