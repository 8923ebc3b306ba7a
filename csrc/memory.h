// What the C allocator does with freed memory.
#pragma once

#include <string>

namespace lit_fast {

struct AllocatorReport {
    bool applied;
    std::string what;  // what was done, or why nothing was
};

// keep: freed memory stays in the process for reuse, so that the next step's gradients cost no page faults.
// Otherwise: glibc's documented defaults. Process-wide; may be called at any time.
AllocatorReport keep_freed_memory(bool keep);

}  // namespace lit_fast
