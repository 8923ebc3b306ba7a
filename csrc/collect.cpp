// What a step will work on: every parameter, gradient and state of an optimizer, found and checked before anything is
// written.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "python.h"
#include "stepper.h"

namespace lit_fast {
namespace {

bool as_number(PyObject* value, double& out) {
    if (PyFloat_Check(value)) {
        out = PyFloat_AS_DOUBLE(value);
        return true;
    }
    if (PyLong_Check(value)) {  // bool too
        out = PyLong_AsDouble(value);
        return true;
    }
    if (value == Py_None) {
        out = 0.0;
        return true;
    }
    if (torch_side().reader.plain(value)) {
        TensorView view;
        std::string unused;
        if (!torch_side().reader.read(value, view, unused)) return false;
        if (view.device != Device::cpu || view.numel != 1) return false;  // a device's number would need a host sync
    }
    PyObject* number = PyNumber_Float(value);
    if (number == nullptr) {
        PyErr_Clear();
        return false;
    }
    out = PyFloat_AS_DOUBLE(number);
    Py_DECREF(number);
    return true;
}

}  // namespace

bool Stepper::read_options(PyObject* group, double* options, std::string& refusal) const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(mapping_.refused_keys); ++i) {
        PyObject* key = PyTuple_GET_ITEM(mapping_.refused_keys, i);
        PyObject* value = get_item(group, key);
        if (value == nullptr || value == Py_False || value == Py_None) continue;
        if (PyObject_IsTrue(value) != 0) {
            PyErr_Clear();
            refusal = "its option " + text_of(key) + " has no compiled kernel";
            return false;
        }
    }
    int count = 0;
    const auto push = [&](PyObject* value) {
        return count < info_->option_count && as_number(value, options[count]) && ++count > 0;
    };
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(mapping_.option_keys); ++i) {
        PyObject* key = PyTuple_GET_ITEM(mapping_.option_keys, i);
        PyObject* value = get_item(group, key);
        bool ok = value != nullptr;
        if (ok && PyTuple_Check(value)) {
            for (Py_ssize_t k = 0; ok && k < PyTuple_GET_SIZE(value); ++k) ok = push(PyTuple_GET_ITEM(value, k));
        } else if (ok && PyList_Check(value)) {
            for (Py_ssize_t k = 0; ok && k < PyList_GET_SIZE(value); ++k) ok = push(PyList_GET_ITEM(value, k));
        } else if (ok) {
            ok = push(value);
        }
        if (!ok) {
            refusal = "its option " + text_of(key) + " is not a number that is known on the host";
            return false;
        }
    }
    if (count != info_->option_count) {
        refusal = "its options are not those of the kernel " + std::string(info_->name);
        return false;
    }
    return true;
}

bool Stepper::lacks_state(PyObject* entry) const {
    for (int k = 0; k < info_->state_count; ++k) {
        PyObject* value = get_item(entry, PyTuple_GET_ITEM(mapping_.state_keys, k));
        if (value == nullptr || value == Py_None) return true;
    }
    return false;
}

// step: this step's number, or 0 where only the device knows it (then task.step points to it).
bool Stepper::read_counter(PyObject* entry, StepTask& task, double& step, std::string& refusal) {
    const TensorReader& reader = torch_side().reader;
    PyObject* counter = get_item(entry, mapping_.step_key);
    TensorView view;
    std::string cause;
    if (counter == nullptr || !reader.plain(counter) || !reader.read(counter, view, cause) ||
        view.dtype != Dtype::float32 || view.numel != 1 ||
        (view.device != Device::cpu && !misplaced(view, cuda_).empty())) {
        refusal =
            "the state " + text_of(mapping_.step_key) + " is not one float32 number on the CPU or beside its parameter";
        return false;
    }
    Py_INCREF(counter);
    refs_.keep(counter);
    written_.push_back(counter);
    auto* value = static_cast<float*>(view.data);
    if (view.device == Device::cpu) {
        counters_.push_back({value, *value + 1.0F});
        step = counters_.back().next;
    } else {
        device_counters_.push_back(value);
        task.step = value;
    }
    return true;
}

bool Stepper::collect_parameter(PyObject* group, PyObject* param, const double* options, PyObject* state,
                                std::string& refusal) {
    const TensorReader& reader = torch_side().reader;
    if (!reader.plain(param)) {
        refusal = "a parameter is a " + type_name(param) + ", not a plain tensor";
        return false;
    }
    PyObject* grad = checked(PyObject_GetAttr(param, grad_name()));
    if (grad == Py_None) {
        Py_DECREF(grad);
        return true;  // skipped, as torch does
    }
    refs_.keep(grad);
    if (!reader.plain(grad)) {
        refusal = "a gradient is a " + type_name(grad) + ", not a plain tensor";
        return false;
    }
    Py_INCREF(param);
    refs_.keep(param);

    TensorView p, g, s;
    std::string cause;
    // Parameters were looked at when the optimizer was adopted; gradients are new every time.
    if (!reader.read(param, p, cause) || !reader.read(grad, g, cause) || !reader.holds_values(grad, cause)) {
        refusal = "a parameter or gradient cannot be read: " + cause;
        return false;
    }
    for (const TensorView* view : {&p, &g}) {
        cause = misplaced(*view, cuda_);
        if (cause.empty()) continue;
        refusal = "a parameter or gradient " + cause;
        return false;
    }
    if (!p.dense() || !p.same_layout(g)) {
        refusal = "a parameter and its gradient are not dense or differ in shape or strides";
        return false;
    }

    StepTask task;
    task.param = p.data;
    task.grad = g.data;
    task.numel = p.numel;
    task.stateless = info_->stateless(options);
    Dtype state_dtype = p.dtype;
    bool first = false;
    double step = 0.0;
    if (!task.stateless) {
        PyObject* entry = get_item(state, param);
        const bool absent = entry == nullptr || !PyDict_Check(entry) || PyDict_GET_SIZE(entry) == 0;
        if (absent || lacks_state(entry)) {
            PyObject* arguments[] = {state, group, param};
            Py_DECREF(checked(PyObject_Vectorcall(mapping_.init_state, arguments, 3, nullptr)));
            new_states_.push_back({param, absent});
            first = true;
            entry = get_item(state, param);
        }
        for (int k = 0; k < info_->state_count; ++k) {
            PyObject* key = PyTuple_GET_ITEM(mapping_.state_keys, k);
            PyObject* value = entry != nullptr && PyDict_Check(entry) ? get_item(entry, key) : nullptr;
            if (value == nullptr || !reader.plain(value)) {
                refusal = "the optimizer's state has no tensor " + text_of(key) + " for a parameter";
                return false;
            }
            Py_INCREF(value);
            refs_.keep(value);
            if (!reader.read(value, s, cause)) {
                refusal = "the state " + text_of(key) + " cannot be read: " + cause;
                return false;
            }
            if (s.device != p.device || !p.same_layout(s) || (k > 0 && s.dtype != state_dtype)) {
                refusal = "the state " + text_of(key) + " differs from its parameter in device, shape or strides";
                return false;
            }
            state_dtype = s.dtype;
            task.state[k] = s.data;
            written_.push_back(value);
        }
        if (info_->counts_steps && !read_counter(entry, task, step, refusal)) return false;
    }
    task.layout = layout_of(p.dtype, g.dtype, state_dtype);
    if (task.layout < 0) {
        refusal = "its dtypes have no compiled kernel (float32 and bfloat16 have)";
        return false;
    }
    const std::int64_t width = p.dtype == Dtype::float32 ? torch_side().vector_width : 2 * torch_side().vector_width;
    task.body = info_->has_remainder(options) ? p.numel - p.numel % width : p.numel;
    if (cuda_ != nullptr) task.body = p.numel;
    if (last_step_ != step || last_first_ != first) {
        batch_.coefficients.push_back(info_->coefficients(options, step, first));
        batch_.options.emplace_back();
        std::copy_n(options, kMaxOptions, batch_.options.back().values);
        batch_.options.back().step = step;
        batch_.options.back().first = first;
        last_step_ = step;
        last_first_ = first;
    }
    task.coefficients = static_cast<std::int32_t>(batch_.coefficients.size()) - 1;
    written_.push_back(param);
    elements_ += p.numel;
    grads_.push_back({g.data, g.numel, g.dtype});
    batch_.tasks.push_back(task);
    return true;
}

bool Stepper::collect(PyObject* param_groups, PyObject* state, std::string& refusal) {
    batch_.tasks.clear();
    batch_.coefficients.clear();
    batch_.options.clear();
    grads_.clear();
    counters_.clear();
    device_counters_.clear();
    new_states_.clear();
    written_.clear();
    elements_ = 0;
    bool ok = true;
    for_each_group(param_groups, [&](PyObject* group, PyObject* params, Py_ssize_t) {
        double options[kMaxOptions] = {};
        ok = ok && read_options(group, options, refusal);
        last_step_ = -1.0;  // coefficients are shared within a group only
        for (Py_ssize_t i = 0; ok && i < PyList_GET_SIZE(params); ++i) {
            ok = collect_parameter(group, PyList_GET_ITEM(params, i), options, state, refusal);
        }
    });
    return ok && memory_is_disjoint(refusal);
}

bool Stepper::memory_is_disjoint(std::string& refusal) {
    ranges_.clear();
    const auto add = [&](const void* data, std::int64_t bytes, bool written) {
        const auto* begin = static_cast<const char*>(data);
        if (bytes > 0) ranges_.push_back({begin, begin + bytes, written});
    };
    for (std::size_t i = 0; i < batch_.tasks.size(); ++i) {
        const StepTask& task = batch_.tasks[i];
        const std::int64_t bytes = task.numel * bytes_of(grads_[i].dtype);
        const bool half_state = task.layout != static_cast<int>(Layout::float32);
        add(task.param, bytes, true);
        add(task.grad, bytes, false);
        for (int k = 0; k < info_->state_count && !task.stateless; ++k) {
            add(task.state[k], task.numel * (half_state ? 2 : 4), true);
        }
    }
    for (const StepCounter& counter : counters_) add(counter.value, sizeof(float), true);
    for (const float* counter : device_counters_) add(counter, sizeof(float), true);
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const char *written_end = nullptr, *any_end = nullptr;
    for (const Range& range : ranges_) {
        if (range.begin < (range.written ? any_end : written_end)) {
            refusal = "parameters, gradients or states share memory";
            return false;
        }
        any_end = std::max(any_end, range.end);
        if (range.written) written_end = std::max(written_end, range.end);
    }
    return true;
}

// A refused step leaves the state as it found it: torch's own step must see a first step as one.
void Stepper::undo_new_states(PyObject* state) {
    for (const NewState& entry : new_states_) {
        if (entry.absent) {
            if (PyDict_DelItem(state, entry.param) != 0) PyErr_Clear();
            continue;
        }
        PyObject* values = get_item(state, entry.param);
        for (int k = 0; values != nullptr && k < info_->state_count; ++k) {
            if (PyDict_SetItem(values, PyTuple_GET_ITEM(mapping_.state_keys, k), Py_None) != 0) throw PythonError{};
        }
    }
}

std::string Stepper::check_parameters(PyObject* param_groups, bool on_cuda, int device_index) {
    std::string refusal;
    CudaContext there;
    there.on.device = device_index;
    const CudaContext* cuda = on_cuda ? &there : nullptr;
    for_each_group(param_groups, [&](PyObject* group, PyObject* params, Py_ssize_t) {
        double options[kMaxOptions] = {};
        if (!refusal.empty() || !read_options(group, options, refusal)) return;
        for (Py_ssize_t i = 0; refusal.empty() && i < PyList_GET_SIZE(params); ++i) {
            PyObject* param = PyList_GET_ITEM(params, i);
            TensorView view;
            std::string cause;
            if (!torch_side().reader.plain(param)) {
                refusal = "a parameter is a " + type_name(param) + ", not a plain tensor";
            } else if (!torch_side().reader.read(param, view, cause) ||
                       !torch_side().reader.holds_values(param, cause)) {
                refusal = "a parameter cannot be read: " + cause;
            } else if (!(cause = misplaced(view, cuda)).empty()) {
                refusal = "a parameter " + cause;
            } else if (!view.dense()) {
                refusal = "a parameter is not dense in memory";
            } else if (layout_of(view.dtype, view.dtype, view.dtype) < 0) {
                refusal = "its dtypes have no compiled kernel (float32 and bfloat16 have)";
            }
        }
    });
    return refusal;
}

}  // namespace lit_fast
