#include "memory.h"

#if defined(__GLIBC__) || __has_include(<gnu/libc-version.h>)
#include <malloc.h>
#define LIT_FAST_GLIBC 1
#endif

namespace lit_fast {

AllocatorReport keep_freed_memory([[maybe_unused]] bool keep) {
#if defined(LIT_FAST_GLIBC)
    // glibc's mallopt(3): thresholds in bytes. Values that do not fit an int's range are refused.
    constexpr int kNever = 0x7fffffff;
    constexpr int kDefaultThreshold = 128 * 1024;
    constexpr int kKeptTopPad = 64 << 20;
    bool done = true;
    if (keep) {
        // No allocation is a mapping of its own that free() would unmap; the heap's end is never given back; and it
        // grows in large pieces.
        done = mallopt(M_MMAP_MAX, 0) == 1 && done;
        done = mallopt(M_TRIM_THRESHOLD, kNever) == 1 && done;
        done = mallopt(M_TOP_PAD, kKeptTopPad) == 1 && done;
    } else {
        done = mallopt(M_MMAP_MAX, 65536) == 1 && done;
        done = mallopt(M_MMAP_THRESHOLD, kDefaultThreshold) == 1 && done;
        done = mallopt(M_TRIM_THRESHOLD, kDefaultThreshold) == 1 && done;
        done = mallopt(M_TOP_PAD, 0) == 1 && done;
        malloc_trim(0);
    }
    if (!done) return {false, "mallopt refused a value"};
    if (keep) return {true, "mallopt: M_MMAP_MAX=0, M_TRIM_THRESHOLD=2 GiB, M_TOP_PAD=64 MiB"};
    return {true, "mallopt: glibc's defaults (mmap and trim threshold 128 KiB), malloc_trim"};
#else
    return {false, "the C library is not glibc: freed memory is returned as it sees fit"};
#endif
}

}  // namespace lit_fast
