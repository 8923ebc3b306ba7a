// What a step will work on: every parameter, gradient and state of an optimizer, found and checked before anything is
// written.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "formulas/steps.h"
#include "formulas/storage.h"
#include "python.h"
#include "stepper.h"

namespace lit_fast {
namespace {

bool is_text(PyObject* value, const char* text) {
    return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}

bool as_number(PyObject* value, double& out) {
    if (PyFloat_Check(value)) {
        out = PyFloat_AS_DOUBLE(value);
        return true;
    }
    if (PyLong_Check(value)) {  // bool too
        out = PyLong_AsDouble(value);
        if (out != -1.0 || PyErr_Occurred() == nullptr) return true;
        PyErr_Clear();  // more than a double holds
        return false;
    }
    if (torch_side().reader.plain(value)) {
        TensorView view;
        std::string unused;
        if (!torch_side().reader.read(value, view, unused)) return false;
        if (view.device != Device::cpu || view.numel != 1) return false;  // a device's number would need a host sync
    }
    if (PyNumber_Check(value) == 0) return false;  // text, which float() would read
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
        if (ok && (PyTuple_Check(value) || PyList_Check(value))) {
            // Several options at once, none of which bears the key's name: betas.
            ok = count < info_->option_count && !is_text(key, info_->option_names[count]);
            for (Py_ssize_t k = 0; ok && k < PySequence_Fast_GET_SIZE(value); ++k) {
                ok = push(PySequence_Fast_GET_ITEM(value, k));
            }
        } else if (value == Py_None) {
            ok = is_text(key, "fused") && push(Py_False);  // torch's default, which leaves the choice to it
        } else if (ok) {
            ok = push(value);
        }
        if (!ok) {
            refusal = "its option " + text_of(key) + " is not a number that is known on the host";
            return false;
        }
    }
    if (count != info_->option_count) {
        refusal = "its options are " + std::to_string(count) + " numbers, and the kernel " + std::string(info_->name) +
                  " takes " + std::to_string(info_->option_count);
        return false;
    }
    return true;
}

namespace {

// The keys of a param group and of a parameter's state that say how things are stored.
struct StorageKeys {
    PyObject* state_dtype = PyUnicode_InternFromString("state_dtype");
    PyObject* rounding = PyUnicode_InternFromString("rounding");
    PyObject* master = PyUnicode_InternFromString("master");
    PyObject* remainder = PyUnicode_InternFromString("remainder");
    PyObject* seed = PyUnicode_InternFromString("seed");
};
const StorageKeys& storage_keys() {
    static const StorageKeys keys;
    return keys;
}

bool absent_or_none(PyObject* value) { return value == nullptr || value == Py_None; }

}  // namespace

bool Stepper::read_group(PyObject* object, Py_ssize_t place, Group& group, std::string& refusal) const {
    group.object = object;
    if (read_options(object, group.options, refusal) && read_storage(object, group, refusal)) return true;
    refusal += " (param group " + std::to_string(place) + ")";
    return false;
}

bool Stepper::read_storage(PyObject* object, Group& group, std::string& refusal) const {
    group.form = info_->form(group.options);
    PyObject* rounding = get_item(object, storage_keys().rounding);
    if (!absent_or_none(rounding)) {
        group.stochastic = is_text(rounding, "stochastic");
        if (!group.stochastic && !is_text(rounding, "nearest")) {
            refusal = "its option rounding is neither 'nearest' nor 'stochastic'";
            return false;
        }
    }
    PyObject* master = get_item(object, storage_keys().master);
    if (!absent_or_none(master)) {
        group.master = is_text(master, "float32") ? Master::float32 : Master::remainder;
        if (group.master == Master::remainder && !is_text(master, "remainder")) {
            refusal = "its option master is neither None, 'float32' nor 'remainder'";
            return false;
        }
    }
    PyObject* state_dtype = get_item(object, storage_keys().state_dtype);
    if (!absent_or_none(state_dtype)) {
        group.state = is_text(state_dtype, "float32")    ? Dtype::float32
                      : is_text(state_dtype, "bfloat16") ? Dtype::bfloat16
                                                         : Dtype::uint8;
        if (group.state == Dtype::uint8 && !is_text(state_dtype, "8bit")) {
            refusal = "its option state_dtype is neither None, 'float32', 'bfloat16' nor '8bit'";
            return false;
        }
    }
    PyObject* seed = get_item(object, storage_keys().seed);
    if (!absent_or_none(seed)) {
        group.seed = PyLong_AsUnsignedLongLongMask(seed);
        if (PyErr_Occurred() != nullptr) {
            PyErr_Clear();
            refusal = "its option seed is not an integer";
            return false;
        }
    }
    return true;
}

unsigned Stepper::missing_states(PyObject* entry, unsigned form) const {
    unsigned missing = 0;
    for (int k = 0; k < info_->state_count; ++k) {
        if (uses(form, k) && absent_or_none(get_item(entry, PyTuple_GET_ITEM(mapping_.state_keys, k))) &&
            absent_or_none(get_item(entry, PyTuple_GET_ITEM(mapping_.code_keys, k)))) {
            missing |= 1U << k;
        }
    }
    return missing;
}

// A tensor of the parameter's state that lies like the parameter; kept alive and marked as written.
bool Stepper::read_beside(PyObject* entry, PyObject* key, const TensorView& like, TensorView& view,
                          std::string& refusal) {
    const TensorReader& reader = torch_side().reader;
    PyObject* value = entry != nullptr && PyDict_Check(entry) ? get_item(entry, key) : nullptr;
    std::string cause;
    if (value == nullptr || !reader.plain(value)) {
        refusal = "the optimizer's state has no tensor " + text_of(key) + " for a parameter";
        return false;
    }
    Py_INCREF(value);
    refs_.keep(value);
    if (!reader.read(value, view, cause)) {
        refusal = "the state " + text_of(key) + " cannot be read: " + cause;
        return false;
    }
    if (view.device != like.device || !like.same_layout(view)) {
        refusal =
            "the state " + text_of(key) +
            " differs from its parameter in device, shape or strides (load_state_dict(state_dict()) moves it, but "
            "gives it no other shape)";
        return false;
    }
    written_.push_back(value);
    return true;
}

bool Stepper::counts_elsewhere(PyObject* entry, const TensorView& like) const {
    PyObject* counter = get_item(entry, mapping_.step_key);
    TensorView view;
    std::string unused;
    const TensorReader& reader = torch_side().reader;
    return counter != nullptr && reader.plain(counter) && reader.read(counter, view, unused) &&
           view.device != like.device;
}

// step: this step's number, or 0 where only the device knows it (then task.step points to it).
bool Stepper::read_counter(PyObject* entry, const TensorView& like, StepTask& task, double& step,
                           std::string& refusal) {
    const TensorReader& reader = torch_side().reader;
    PyObject* counter = get_item(entry, mapping_.step_key);
    TensorView view;
    std::string cause;
    if (counter == nullptr || !reader.plain(counter) || !reader.read(counter, view, cause) ||
        view.dtype != Dtype::float32 || view.numel != 1 || view.data == nullptr ||
        (view.device != Device::cpu && !misplaced(view, cuda_).empty())) {
        refusal =
            "the state " + text_of(mapping_.step_key) + " is not one float32 number on the CPU or beside its parameter";
        return false;
    }
    Py_INCREF(counter);
    refs_.keep(counter);
    written_.push_back(counter);
    auto* value = static_cast<float*>(view.data);
    if (view.device != like.device && (skips_ || cuda_->capturing)) {
        refusal = "the state " + text_of(mapping_.step_key) + " is on the CPU, which would count " +
                  (cuda_->capturing ? "no step that a CUDA graph replays" : "a step that the device leaves out");
        return false;
    }
    ranges_.push_back({value, value + 1, true, number_});
    if (view.device != Device::cpu || skips_) {
        task.step = value;
        return true;
    }
    counters_.push_back({value, next_step(*value, draws(task.storage))});
    step = counters_.back().next;
    // Random bits take it as an integer; a count beyond what a float32 counts to came from elsewhere.
    if (step >= 1.0 && static_cast<double>(*value) < 0x1p63) return true;
    refusal = "the state " + text_of(mapping_.step_key) + " is " + std::to_string(*value) + ", which counts no steps";
    return false;
}

// Finds, or has made, what belongs to a parameter beside its value.
bool Stepper::collect_state(const Group& group, PyObject* param, const TensorView& like, PyObject* state,
                            StepTask& task, double& step, bool& first, std::string& refusal) {
    const StorageKeys& keys = storage_keys();
    const bool half = like.dtype != Dtype::float32;
    task.storage.master = half ? group.master : Master::none;
    task.storage.stochastic = group.stochastic;
    PyObject* master_key = task.storage.master == Master::float32 ? keys.master : keys.remainder;
    if ((task.form & kSetOfForm) == 0 && task.storage.master == Master::none && !group.stochastic) return true;

    PyObject* entry = get_item(state, param);
    if (entry != nullptr && !PyDict_Check(entry)) {
        refusal = "the optimizer's state of a parameter is a " + type_name(entry) + ", not a dict";
        return false;
    }
    const bool absent = entry == nullptr || PyDict_GET_SIZE(entry) == 0;
    const unsigned missing = absent ? task.form & kSetOfForm : missing_states(entry, task.form);
    const bool lacks_master = task.storage.master != Master::none && (absent || get_item(entry, master_key) == nullptr);
    const bool draws = group.stochastic || group.state == Dtype::uint8;
    const bool lacks_step = draws && !absent && get_item(entry, mapping_.step_key) == nullptr;
    const bool must_move_step = skips_ && !absent && counts_elsewhere(entry, like);
    if (absent || missing != 0 || lacks_master || lacks_step || must_move_step) {
        init_state(state, group.object, param);
        // Whether a step that may have been left out was the first one, only the device knows: new states are zeros.
        first = missing != 0 && !skips_;
        entry = get_item(state, param);
    }
    bool any = false;
    for (int k = 0; k < info_->state_count; ++k) {
        if (!uses(task.form, k)) continue;
        PyObject* key = PyTuple_GET_ITEM(mapping_.code_keys, k);
        const bool codes = PyDict_Check(entry) && get_item(entry, key) != nullptr;
        if (!codes) key = PyTuple_GET_ITEM(mapping_.state_keys, k);
        TensorView view;
        if (!read_beside(entry, key, like, view, refusal)) return false;
        if (any && view.dtype != task.storage.state) {
            refusal = "the state " + text_of(key) + " has another dtype than the parameter's other states";
            return false;
        }
        if (codes != (view.dtype == Dtype::uint8)) {
            refusal = "the state " + text_of(key) + (codes ? " does not hold uint8 codes" : " holds uint8");
            return false;
        }
        if (group.state != Dtype::other && view.dtype != group.state) {
            refusal = "the state " + text_of(key) +
                      " is not kept as its option state_dtype asks (load_state_dict(state_dict()) converts it)";
            return false;
        }
        any = true;
        task.storage.state = view.dtype;
        task.state[k] = view.data;
        if (!codes) continue;
        PyObject* scale_key = PyTuple_GET_ITEM(mapping_.scale_keys, k);
        PyObject* scale = get_item(entry, scale_key);
        TensorView scales;
        std::string cause;
        if (scale == nullptr || !torch_side().reader.plain(scale) || !torch_side().reader.read(scale, scales, cause) ||
            scales.device != like.device || scales.dtype != Dtype::float32 || !scales.contiguous() ||
            scales.numel != (like.numel + kCodeBlock - 1) / kCodeBlock) {
            refusal = "the state " + text_of(scale_key) + " does not hold one float32 for each 256 codes";
            return false;
        }
        Py_INCREF(scale);
        refs_.keep(scale);
        written_.push_back(scale);
        task.code_scale[k] = static_cast<float*>(scales.data);
    }
    if (task.storage.master != Master::none) {
        TensorView view;
        if (!read_beside(entry, master_key, like, view, refusal)) return false;
        if (view.dtype != (task.storage.master == Master::float32 ? Dtype::float32 : Dtype::int16)) {
            refusal = "the state " + text_of(master_key) + " has another dtype than a " + text_of(master_key) + " has";
            return false;
        }
        task.master = view.data;
    }
    if (info_->counts_steps || group.stochastic || task.storage.state == Dtype::uint8) {
        return read_counter(entry, like, task, step, refusal);
    }
    return true;
}

namespace {

// Blocks of 8-bit codes and of random bits begin at multiples of kCodeBlock.
std::uint64_t read_first_index(PyObject* first_indices, Py_ssize_t index) {
    const std::uint64_t first = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(first_indices, index));
    if (PyErr_Occurred() != nullptr) throw PythonError{};
    check(first % kCodeBlock == 0, "an entry of param_group['first_indices'] is not a multiple of 256.");
    return first;
}

}  // namespace

bool Stepper::collect_parameter(const Group& group, Py_ssize_t index, PyObject* param, PyObject* state,
                                std::string& refusal) {
    const TensorReader& reader = torch_side().reader;
    if (!reader.plain(param)) {
        refusal = "a parameter is a " + type_name(param) + ", not a plain tensor";
        return false;
    }
    TensorView p, g;
    std::string cause;
    // Parameters were looked at when the optimizer was adopted; gradients are new every time.
    if (!reader.read(param, p, cause)) {
        refusal = "a parameter cannot be read: " + cause;
        return false;
    }
    StepTask task;
    task.first_index = first_index_;
    if (group.first_indices != nullptr) task.first_index = read_first_index(group.first_indices, index);
    first_index_ += static_cast<std::uint64_t>((p.numel + kCodeBlock - 1) / kCodeBlock * kCodeBlock);
    PyObject* grad = nullptr;
    if (group.grads == nullptr) {
        grad = checked(PyObject_GetAttr(param, grad_name()));
    } else {
        grad = PyList_GET_ITEM(group.grads, index);
        Py_INCREF(grad);
    }
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
    if (!reader.read(grad, g, cause) || !reader.holds_values(grad, cause)) {
        refusal = "a gradient cannot be read: " + cause;
        return false;
    }
    for (const TensorView* view : {&p, &g}) {
        cause = misplaced(*view, cuda_);
        if (cause.empty()) continue;
        refusal = "a parameter or gradient " + cause;
        return false;
    }
    if (!p.dense()) {
        refusal = "a parameter is not dense in memory";
        return false;
    }
    if (!p.same_layout(g)) {
        refusal =
            "a parameter and its gradient differ in shape or strides; copy the gradient into a torch.empty_like(p)";
        return false;
    }

    task.param = p.data;
    task.grad = g.data;
    task.numel = p.numel;
    task.form = group.form;
    task.seed = group.seed;
    task.storage.param = task.storage.state = p.dtype;
    task.storage.grad = g.dtype;
    bool first = false;
    double step = 0.0;
    if (!collect_state(group, param, p, state, task, step, first, refusal)) return false;
    if (const char* why = impossible(task.storage); why != nullptr) {
        refusal = why;
        return false;
    }
    task.layout = layout_of(task.storage, (task.form & kSetOfForm) == 0);
    task.step_number = static_cast<std::uint64_t>(step);
    task.body = p.numel;
    const Storage& s = task.storage;
    const bool as_torch = s.master == Master::none && !s.stochastic && s.grad == s.param && s.state == s.param;
    if (cuda_ == nullptr && (as_torch || s.param == Dtype::float32) && info_->has_remainder(group.options)) {
        const std::int64_t lanes = torch_side().vector_width;
        task.body -= p.numel % (p.dtype == Dtype::float32 ? lanes : 2 * lanes);
    }
    if (last_step_ != step || last_first_ != first) {
        batch_.coefficients.push_back(info_->coefficients(group.options, step, first));
        batch_.options.emplace_back();
        std::copy_n(group.options, kMaxOptions, batch_.options.back().values);
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
    add_ranges(task);
    return true;
}

bool Stepper::collect(PyObject* param_groups, PyObject* state, std::string& refusal) {
    batch_.tasks.clear();
    batch_.coefficients.clear();
    batch_.options.clear();
    grads_.clear();
    counters_.clear();
    ranges_.clear();
    new_states_.clear();
    written_.clear();
    elements_ = 0;
    first_index_ = 0;
    number_ = 0;
    bool ok = true;
    for_each_group(param_groups, [&](PyObject* object, PyObject* params, Py_ssize_t place) {
        Group group;
        ok = ok && read_group(object, place, group, refusal);
        group.grads = get_item(object, grads_name());
        if (group.grads != nullptr &&
            (!PyList_Check(group.grads) || PyList_GET_SIZE(group.grads) != PyList_GET_SIZE(params))) {
            throw KernelError("param_group['grads'] is not a list beside param_group['params'].");
        }
        group.first_indices = get_item(object, first_indices_name());
        if (group.first_indices != nullptr &&
            (!PyList_Check(group.first_indices) || PyList_GET_SIZE(group.first_indices) != PyList_GET_SIZE(params))) {
            throw KernelError("param_group['first_indices'] is not a list beside param_group['params'].");
        }
        last_step_ = -1.0;  // coefficients are shared within a group only
        for (Py_ssize_t i = 0; ok && i < PyList_GET_SIZE(params); ++i) {
            ok = collect_parameter(group, i, PyList_GET_ITEM(params, i), state, refusal);
            if (!ok) refusal += " (parameter " + std::to_string(number_) + " of the optimizer)";
            ++number_;
        }
    });
    return ok && memory_is_disjoint(refusal);
}

// Where a step reads and writes.
void Stepper::add_ranges(const StepTask& task) {
    const auto add = [&](const void* data, std::int64_t bytes, bool written) {
        const auto* begin = static_cast<const char*>(data);
        if (bytes > 0 && begin == nullptr) {  // torch's own step would read it, too
            throw KernelError("parameter " + std::to_string(number_) +
                              " of the optimizer, its gradient or its state has no memory: its storage was resized to "
                              "nothing. Give it back its numbers before the step.");
        }
        if (bytes > 0) ranges_.push_back({begin, begin + bytes, written, number_});
    };
    add(task.param, task.numel * bytes_of(task.storage.param), true);
    add(task.grad, task.numel * bytes_of(task.storage.grad), false);
    if (task.storage.master != Master::none) {
        add(task.master, task.numel * (task.storage.master == Master::float32 ? 4 : 2), true);
    }
    for (int k = 0; k < info_->state_count; ++k) {
        if (!uses(task.form, k)) continue;
        add(task.state[k], task.numel * bytes_of(task.storage.state), true);
        if (task.storage.state != Dtype::uint8) continue;
        add(task.code_scale[k], (task.numel + kCodeBlock - 1) / kCodeBlock * 4, true);
    }
}

bool Stepper::memory_is_disjoint(std::string& refusal) {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    Range written{}, any{};  // those that reach furthest so far
    for (const Range& range : ranges_) {
        const Range& before = range.written ? any : written;
        if (range.begin < before.end) {
            const auto [first, second] = std::minmax(before.number, range.number);
            const std::string both = "s " + std::to_string(first) + " and " + std::to_string(second);
            refusal = "parameter" + (first == second ? " " + std::to_string(first) : both) +
                      " of the optimizer, gradients or states share memory";
            return false;
        }
        if (range.end > any.end) any = range;
        if (range.written && range.end > written.end) written = range;
    }
    return true;
}

// Has what a parameter's state lacks made.
void Stepper::init_state(PyObject* state, PyObject* group, PyObject* param) {
    PyObject* entry = get_item(state, param);
    Py_XINCREF(entry);
    if (entry != nullptr) refs_.keep(entry);
    PyObject* values = entry != nullptr && PyDict_Check(entry) ? refs_.keep(checked(PyDict_Copy(entry))) : nullptr;
    new_states_.push_back({param, entry, values});
    PyObject* arguments[] = {state, group, param};
    Py_DECREF(checked(PyObject_Vectorcall(mapping_.init_state, arguments, 3, nullptr)));
}

// A step that is not taken leaves the state as it found it: torch's own step must see a first step as one.
void Stepper::undo_new_states(PyObject* state) {
    for (const NewState& before : new_states_) {
        if (before.entry == nullptr) {
            if (PyDict_DelItem(state, before.param) != 0) PyErr_Clear();  // init_state failed before it made one
            continue;
        }
        if (before.values != nullptr) {
            PyDict_Clear(before.entry);
            if (PyDict_Update(before.entry, before.values) != 0) throw PythonError{};
        }
        if (PyDict_SetItem(state, before.param, before.entry) != 0) throw PythonError{};
    }
}

std::string Stepper::check_parameters(PyObject* param_groups, bool by_table, bool on_cuda, int device_index) {
    std::string refusal;
    CudaContext there;
    there.on.device = device_index;
    const CudaContext* cuda = on_cuda ? &there : nullptr;
    Py_ssize_t number = 0;
    for_each_group(param_groups, [&](PyObject* group, PyObject* params, Py_ssize_t place) {
        Group read;
        if (!refusal.empty() || !read_group(group, place, read, refusal)) return;
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
            } else {
                Storage storage;
                storage.param = storage.grad = storage.state = view.dtype;
                if (view.dtype != Dtype::float32) storage.master = read.master;
                storage.stochastic = read.stochastic;
                const bool stateless = (read.form & kSetOfForm) == 0;
                if (!stateless && read.state != Dtype::other) storage.state = read.state;
                const char* why = impossible(storage);
                if (why == nullptr && by_table) why = Table::why_not(layout_of(storage, stateless), read.form);
                if (why != nullptr) refusal = why;
            }
            if (!refusal.empty()) refusal += " (parameter " + std::to_string(number) + " of the optimizer)";
            ++number;
        }
    });
    return refusal;
}

std::string Stepper::check_step(PyObject* param_groups, PyObject* state, bool by_table, const CudaContext* cuda) {
    return collected(param_groups, state, cuda, false,
                     [&](StepResult& result) {
                         if (by_table) fits_table(result.refusal);
                         return false;
                     })
        .refusal;
}

}  // namespace lit_fast
