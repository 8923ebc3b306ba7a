// Steps and norms whose arithmetic is not in the core: it finds and checks what there is to do, kernels that are
// launched from Python do it (lit_fast/triton).
#include <cstring>

#include "python.h"
#include "stepper.h"

namespace lit_fast {
namespace {

std::int64_t word(const void* address) { return static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(address)); }

std::int64_t word(double value) {
    std::int64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

}  // namespace

void Table::add(const StepTask& task, std::int64_t chunk) {
    words.insert(words.end(),
                 {word(task.param), word(task.grad), word(task.step), task.numel, chunks,
                  static_cast<std::int64_t>(task.layout), (task.form & kSetOfForm) == 0 ? 1 : 0, task.coefficients});
    std::int64_t bits = word(task.param) | word(task.grad);
    for (int k = 0; k < kTableStates; ++k) {
        words.push_back(word(task.state[k]));
        bits |= word(task.state[k]);
    }
    aligned = aligned && (task.numel == 0 || bits % 16 == 0);
    chunks += (task.numel + chunk - 1) / chunk;
    ++rows;
}

void Table::add(const Options& options) {
    words.push_back(word(options.step));
    words.push_back(word(options.first ? 1.0 : 0.0));
    for (const double value : options.values) words.push_back(word(value));
}

void Table::launch(const Launcher& launcher) const {
    References refs;
    const auto* bytes = reinterpret_cast<const char*>(words.data());
    const auto size = static_cast<Py_ssize_t>(words.size() * sizeof(std::int64_t));
    PyObject* arguments[] = {refs.keep(checked(PyByteArray_FromStringAndSize(bytes, size))),
                             refs.keep(checked(PyLong_FromLongLong(kRowWords))),
                             refs.keep(checked(PyLong_FromLongLong(kOptionWords))),
                             refs.keep(checked(PyLong_FromLongLong(rows))),
                             refs.keep(checked(PyLong_FromLongLong(chunks))),
                             refs.keep(checked(PyBool_FromLong(aligned ? 1 : 0)))};
    refs.keep(checked(PyObject_Vectorcall(launcher.launch, arguments, 6, nullptr)));
}

bool Stepper::fits_table(std::string& refusal) const {
    for (const StepTask& task : batch_.tasks) {
        if (const char* why = Table::why_not(task.layout, task.form); why != nullptr) {
            refusal = why;
            return false;
        }
    }
    return true;
}

StepResult Stepper::hand_over(PyObject* param_groups, PyObject* state, const Launcher& launcher,
                              const CudaContext* cuda) {
    return collected(param_groups, state, cuda, launcher.skips, [&](StepResult& result) {
        if (!fits_table(result.refusal)) return false;
        Table table;
        for (const StepTask& task : batch_.tasks) table.add(task, launcher.chunk);
        for (const Options& options : batch_.options) table.add(options);
        table.launch(launcher);
        return true;
    });
}

StepResult hand_over_gradients(PyObject* param_groups, bool rewrite, const Launcher& launcher,
                               const CudaContext* cuda) {
    Gradients grads;
    StepResult result;
    result.refusal = grads.collect(param_groups, cuda);
    if (!result.refusal.empty()) return result;
    Table table;
    for (const Span& span : grads.spans) {
        StepTask task;
        task.grad = span.data;
        task.numel = span.numel;
        task.storage.param = task.storage.grad = task.storage.state = span.dtype;
        task.layout = layout_of(task.storage, false);
        if (Table::why_not(task.layout, task.form) != nullptr) {
            result.refusal = "only the core has a kernel for float16 gradients";
            return result;
        }
        table.add(task, launcher.chunk);
    }
    table.launch(launcher);
    if (rewrite) increment_versions(grads.tensors);
    return result;
}

}  // namespace lit_fast
