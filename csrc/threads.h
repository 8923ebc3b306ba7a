// Runs a function on several threads: on the OpenMP runtime that torch has already loaded, or on an own pool where
// there is none.
//
// A second pool beside torch's would spin against it (measured: 3,300 us instead of 80 for work right after a torch
// operation), and a second libgomp would be such a pool: so this file links none and looks the loaded one up.
#pragma once

#include <string>

namespace lit_fast {

// Calls work(argument) on up to `threads` threads, the caller's among them, and returns when all are done. `work` must
// share what is to be done by itself (an atomic counter) and must not throw.
// In a process that was forked after this library was loaded: one thread, because neither the runtime's threads nor
// the pool's survive a fork.
void parallel(void (*work)(void*), void* argument, int threads);

// Looks for a loaded OpenMP runtime, one whose path begins with `preferred_prefix` first.
// May be called again, e.g. after torch has been imported.
void find_openmp(const std::string& preferred_prefix);

// "openmp: <path>", "own pool: <why>"
std::string threading_description();
bool forked();

}  // namespace lit_fast
