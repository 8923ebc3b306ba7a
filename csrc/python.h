// Small helpers over CPython's API, for the files that walk an optimizer.
#pragma once

#include <Python.h>

#include <string>

#include "check.h"
#include "stepper.h"

namespace lit_fast {

inline PyObject* grad_name() {
    static PyObject* name = PyUnicode_InternFromString("grad");
    return name;
}

inline PyObject* grads_name() {
    static PyObject* name = PyUnicode_InternFromString("grads");
    return name;
}

inline PyObject* first_indices_name() {
    static PyObject* name = PyUnicode_InternFromString("first_indices");
    return name;
}

inline PyObject* params_name() {
    static PyObject* name = PyUnicode_InternFromString("params");
    return name;
}

inline PyObject* checked(PyObject* owned) {
    if (owned == nullptr) throw PythonError{};
    return owned;
}

// Borrowed, or nullptr when absent.
inline PyObject* get_item(PyObject* dict, PyObject* key) {
    PyObject* found = PyDict_GetItemWithError(dict, key);
    if (found == nullptr && PyErr_Occurred() != nullptr) throw PythonError{};
    return found;
}

inline std::string text_of(PyObject* str) {
    const char* utf8 = PyUnicode_AsUTF8(str);
    if (utf8 == nullptr) throw PythonError{};
    return utf8;
}

inline std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

// Calls visit(group, index in param_groups) for every group and checks the shapes of the containers.
template <class Visit>
void for_each_group(PyObject* param_groups, const Visit& visit) {
    if (!PyList_Check(param_groups)) throw KernelError("optimizer.param_groups is not a list.");
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
        PyObject* group = PyList_GET_ITEM(param_groups, g);
        if (!PyDict_Check(group)) throw KernelError("an entry of optimizer.param_groups is not a dict.");
        PyObject* params = get_item(group, params_name());
        if (params == nullptr || !PyList_Check(params)) throw KernelError("param_group['params'] is not a list.");
        visit(group, params, g);
    }
}

// Why a tensor cannot be worked on where `cuda` says, or "".
inline std::string misplaced(const TensorView& view, const CudaContext* cuda) {
    if (cuda == nullptr) return view.device == Device::cpu ? "" : "is not on the CPU like the others";
    if (view.device != Device::cuda || view.device_index != cuda->on.device) {
        return "is not on CUDA device " + std::to_string(cuda->on.device) + " like the others";
    }
    return "";
}

// Below this many elements a parallel region (2 to 5 us) costs more than it saves, and so does releasing the GIL.
constexpr std::int64_t kParallelElements = 1 << 16;

inline int threads_for(std::int64_t elements) {
    if (elements < kParallelElements) return 1;
    PyObject* number = checked(PyObject_CallNoArgs(torch_side().num_threads));
    const long threads = PyLong_AsLong(number);
    Py_DECREF(number);
    if (threads == -1 && PyErr_Occurred() != nullptr) throw PythonError{};
    return static_cast<int>(threads);
}

// Runs without the GIL where that pays; has it back whatever happens.
template <class Work>
void run(std::int64_t elements, const Work& work) {
    const int threads = threads_for(elements);
    if (elements < kParallelElements) {
        work(threads);
        return;
    }
    struct WithoutGil {
        PyThreadState* thread_state = PyEval_SaveThread();
        ~WithoutGil() { PyEval_RestoreThread(thread_state); }
    } without_gil;
    work(threads);
}

inline void* pointer_of(PyObject* tensor) {
    TensorView view;
    std::string cause;
    if (!torch_side().reader.read(tensor, view, cause)) throw KernelError("a CUDA tensor cannot be read: " + cause);
    return view.data;
}

}  // namespace lit_fast
