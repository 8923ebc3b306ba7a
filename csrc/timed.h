// What Python calls, timed: three types of objects in C, since a call through pybind11 takes several times as long as
// reading the clock before and after.
#pragma once

#include <Python.h>

#include "phase_clock.h"

namespace lit_fast {

// A new reference to a callable that runs `function`, timed by `clock`, which `owner` keeps alive.
PyObject* timed_call(PyObject* owner, PhaseClock* clock, int slot, PyObject* function);
// ... to an iterator over the same items, the wait for each timed; with `steps` it begins a step. `first` (or None) is
// shown the first item.
PyObject* timed_items(PyObject* owner, PhaseClock* clock, int slot, PyObject* iterator, bool steps, PyObject* first);
// ... to a context manager for a `with` block.
PyObject* timed_block(PyObject* owner, PhaseClock* clock, int slot);

}  // namespace lit_fast
