// Walks a torch optimizer once and steps all of it in one call. CPython only: what it knows of torch is the public
// shape of param_groups and state.
#pragma once

#include <Python.h>

#include <string>
#include <vector>

#include "backend.h"
#include "check.h"
#include "tensor_reader.h"

namespace lit_fast {

// Owned references, dropped together.
class References {
  public:
    References() = default;
    ~References() { clear(); }
    References(const References&) = delete;
    References& operator=(const References&) = delete;
    PyObject* keep(PyObject* owned) {
        objects_.push_back(owned);
        return owned;
    }
    void clear() {
        for (PyObject* object : objects_) Py_DECREF(object);
        objects_.clear();
    }

  private:
    std::vector<PyObject*> objects_;
};

struct Clipping {
    double grad_scale = 1.0;   // multiplies every gradient first (the inverse loss scale)
    double max_norm = -1.0;    // of the scaled gradients; negative: none
    double clip_value = -1.0;  // negative: none
    bool only_finite = false;  // CPU: leave everything as it is where a gradient is NaN or infinite
};

struct StepResult {
    bool has_norm = false;  // on the host; with CUDA the norm is in the context's tensor
    double norm = 0.0;      // of the scaled gradients, before clipping; finite exactly when every gradient is
    std::string refusal;    // why nothing was done; empty when the step was taken
};

// Where the work goes when it does not go to the CPU.
struct CudaContext {
    CudaStream on;                  // torch's current device and stream
    PyObject* norm = nullptr;       // 0-dim float32 tensor there, or None
    PyObject* workspace = nullptr;  // workspace(n) -> float64 tensor of n elements there
    PyObject* factor = nullptr;     // 0-dim float32 tensor there, which multiplies the gradients, or None
    PyObject* skipped = nullptr;  // 0-dim int64 tensor there, which counts steps with a NaN or infinite gradient, which
                                  // leave everything else as it is; or None: they are taken
    bool for_good = false;        // after the first such step none is taken
    bool told = false;            // which step that is the factor says, by NaN; gradients are not read for it
    bool capturing = false;       // a CUDA graph, whose replays the host does not count

    bool skips() const { return skipped != nullptr && skipped != Py_None; }
};

// Kernels outside the core, which finds and checks what they work on: launch(Table's fields in their order), see below.
struct Launcher {
    PyObject* launch = nullptr;
    std::int64_t chunk = 0;  // elements that one program of a kernel takes
    bool skips = false;      // of a step: the kernels decide whether it is taken
};

// What kernels outside the core work on, as 64-bit words that go to the device in one copy. Rows first, then options.
//
//     row      param, grad, step counter (0: not on the device), numel, first chunk, layout, stateless, options,
//              state 0, state 1, ...
//     options  step (0: on the device), first, the formula's options; float64
struct Table {
    static constexpr int kTableStates = 2;  // a row has room for two states
    static constexpr std::int64_t kRowWords = 8 + kTableStates;
    static constexpr std::int64_t kOptionWords = 2 + kMaxOptions;
    std::vector<std::int64_t> words;
    std::int64_t rows = 0;
    std::int64_t chunks = 0;
    // What its reader must know; a layout that joins the core's is the core's alone until it does. nullptr: it does.
    static const char* why_not(Layout layout, unsigned form) {
        const bool known = layout <= Layout::float32_bfloat16_state && !uses(form, kTableStates);
        return known ? nullptr : "only the core has a kernel for its dtypes or options";
    }
    bool aligned = true;  // every address but a counter's is a multiple of 16 bytes

    void add(const StepTask& task, std::int64_t chunk);
    void add(const Options& options);
    // Calls it with (words as a bytearray, kRowWords, kOptionWords, rows, chunks, aligned).
    void launch(const Launcher& launcher) const;
};

// How one optimizer class maps to a formula: names of things in its param_groups and state.
struct Mapping {
    FormulaId formula = FormulaId::count;
    PyObject* option_keys = nullptr;   // tuple of str: group keys whose numbers, in order, are the formula's options
    PyObject* refused_keys = nullptr;  // tuple of str: group keys that must be absent or false
    PyObject* state_keys = nullptr;    // tuple of str, one a state of the formula
    PyObject* code_keys = nullptr;     // tuple of str, one a state: where it stands instead as 8-bit codes
    PyObject* scale_keys = nullptr;    // tuple of str, one a state: the scales of its 8-bit codes
    PyObject* step_key = nullptr;      // str or None
    PyObject* init_state = nullptr;    // init_state(state, group, param) fills state[param] as torch would
};

class Stepper {
  public:
    explicit Stepper(Mapping mapping);  // takes its references over
    ~Stepper();
    Stepper(const Stepper&) = delete;
    Stepper& operator=(const Stepper&) = delete;

    // Everything is checked before anything is written; a step that is not taken leaves the state as it was. Throws
    // PythonError when a Python call failed.
    // cuda: nullptr for the CPU.
    StepResult step(PyObject* param_groups, PyObject* state, const Clipping& clipping, const CudaContext* cuda);
    // The same step by other kernels, which do the clipping too.
    StepResult hand_over(PyObject* param_groups, PyObject* state, const Launcher& launcher, const CudaContext* cuda);
    // The same checks for every parameter, gradients and state left alone: "" or why there is no kernel.
    // by_table: for `hand_over`.
    std::string check_parameters(PyObject* param_groups, bool by_table, bool on_cuda, int device_index);
    // "" or what `step` (`hand_over` with `by_table`) would refuse now. The state is left as it was.
    std::string check_step(PyObject* param_groups, PyObject* state, bool by_table, const CudaContext* cuda);

  private:
    struct StepCounter {
        float* value;
        float next;
    };
    // Memory that belongs to a parameter.
    struct Range {
        const void* begin = nullptr;
        const void* end = nullptr;
        bool written = false;
        Py_ssize_t number = 0;  // of the parameter
    };
    // What stood in the state before a step filled it in; borrowed from refs_.
    struct NewState {
        PyObject* param;
        PyObject* entry;   // nullptr: nothing
        PyObject* values;  // a copy of the entry
    };
    // What a param group asks for, read once a step.
    struct Group {
        PyObject* object = nullptr;
        PyObject* first_indices = nullptr;  // a list beside `params`: StepTask::first_index of each
        PyObject* grads = nullptr;  // a list beside `params`, whose tensors (or None) stand for their own `grad`
        double options[kMaxOptions] = {};
        unsigned form = 0;
        bool stochastic = false;
        Master master = Master::none;
        Dtype state = Dtype::other;  // other: none in particular
        std::uint64_t seed = 0;
    };

    // Everything that surrounds the arithmetic, which is work(result) -> whether it was done.
    // skips: kernels decide whether the step is taken, and so they count it.
    template <class Work>
    StepResult collected(PyObject* param_groups, PyObject* state, const CudaContext* cuda, bool skips,
                         const Work& work);
    bool collect(PyObject* param_groups, PyObject* state, std::string& refusal);
    bool collect_parameter(const Group& group, Py_ssize_t index, PyObject* param, PyObject* state,
                           std::string& refusal);
    bool collect_state(const Group& group, PyObject* param, const TensorView& like, PyObject* state, StepTask& task,
                       double& step, bool& first, std::string& refusal);
    bool read_group(PyObject* object, Py_ssize_t place, Group& group, std::string& refusal) const;
    bool read_storage(PyObject* object, Group& group, std::string& refusal) const;
    bool read_options(PyObject* group, double* options, std::string& refusal) const;
    bool counts_elsewhere(PyObject* entry, const TensorView& like) const;
    bool read_counter(PyObject* entry, const TensorView& like, StepTask& task, double& step, std::string& refusal);
    bool read_beside(PyObject* entry, PyObject* key, const TensorView& like, TensorView& view, std::string& refusal);
    unsigned missing_states(PyObject* entry, unsigned form) const;
    bool fits_table(std::string& refusal) const;
    void add_ranges(const StepTask& task);
    bool memory_is_disjoint(std::string& refusal);
    void init_state(PyObject* state, PyObject* group, PyObject* param);
    void undo_new_states(PyObject* state);

    Mapping mapping_;
    const FormulaInfo* info_;

    // Filled by collect, emptied at the end of every step; kept as members for their capacity.
    StepBatch batch_;
    std::vector<Span> grads_;
    std::vector<StepCounter> counters_;
    std::vector<NewState> new_states_;
    std::vector<Range> ranges_;
    std::vector<PyObject*> written_;  // borrowed from refs_
    References refs_;
    std::int64_t elements_ = 0;
    Py_ssize_t number_ = 0;              // of the parameter that is looked at
    std::uint64_t first_index_ = 0;      // of the next parameter, see StepTask
    const CudaContext* cuda_ = nullptr;  // during a step, and
    bool skips_ = false;                 // as `collected` has it
    double last_step_ = -1.0;
    bool last_first_ = false;
};

// A Python exception is set.
struct PythonError {};

// Process-wide: set once by ops.py.
struct Torch {
    TensorReader reader;
    PyObject* increment_version = nullptr;  // callable(list of tensors)
    PyObject* num_threads = nullptr;        // callable() -> int
    std::int64_t vector_width = 8;          // float32 lanes of torch's own CPU kernels; bfloat16: twice as many
};
Torch& torch_side();

// Every gradient of an optimizer's parameters, found and checked.
struct Gradients {
    std::vector<Span> spans;
    std::vector<PyObject*> tensors;  // borrowed from refs
    References refs;
    std::int64_t elements = 0;

    // "" or why a gradient has no kernel.
    std::string collect(PyObject* param_groups, const CudaContext* cuda);
};

// L2 norm of gradients, or gradients rewritten in place, for any parameters.
StepResult gradient_norm(PyObject* param_groups, const Clipping& clipping, bool rewrite, const CudaContext* cuda);
// The same by other kernels. `param` of each row is 0.
StepResult hand_over_gradients(PyObject* param_groups, bool rewrite, const Launcher& launcher, const CudaContext* cuda);
void increment_versions(const std::vector<PyObject*>& tensors);
void release_gradients(PyObject* param_groups);

template <class Work>
StepResult Stepper::collected(PyObject* param_groups, PyObject* state, const CudaContext* cuda, bool skips,
                              const Work& work) {
    struct Release {
        References& refs;
        ~Release() { refs.clear(); }
    } release{refs_};
    cuda_ = cuda;
    skips_ = skips;
    StepResult result;
    if (!PyDict_Check(state)) throw KernelError("optimizer.state is not a dict.");
    bool done = false;
    try {
        done = collect(param_groups, state, result.refusal) && work(result);
    } catch (...) {
        PyObject *type, *value, *traceback;  // undoing calls Python too
        PyErr_Fetch(&type, &value, &traceback);
        undo_new_states(state);
        PyErr_Restore(type, value, traceback);
        throw;
    }
    if (!done) {
        undo_new_states(state);
        return result;
    }
    for (const StepCounter& counter : counters_) *counter.value = counter.next;
    increment_versions(written_);
    return result;
}

}  // namespace lit_fast
