// The CPU target that a comparing program compares, chosen when it is linked: the programs are compiled once for all.
#include "backend.h"

#ifdef LIT_FAST_TARGET
namespace lit_fast::LIT_FAST_TARGET {
const CpuKernels& kernels();
}
namespace lit_fast::compared_target {
const CpuKernels& kernels() { return LIT_FAST_TARGET::kernels(); }
}  // namespace lit_fast::compared_target
#endif

#ifdef LIT_FAST_TARGET_BUCKETS
namespace lit_fast::LIT_FAST_TARGET_BUCKETS {
const BucketKernels& bucket_kernels();
}
namespace lit_fast::compared_target {
const BucketKernels& bucket_kernels() { return LIT_FAST_TARGET_BUCKETS::bucket_kernels(); }
}  // namespace lit_fast::compared_target
#endif
