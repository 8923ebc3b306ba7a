// Errors of the core. They become lit_fast.errors.KernelError in Python.
#pragma once

#include <stdexcept>
#include <string>

namespace lit_fast {

struct KernelError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void check(bool condition, const char* message) {
    if (!condition) throw KernelError(message);
}

}  // namespace lit_fast
