#include "tensor_reader.h"

#include <string_view>

#include "check.h"

namespace lit_fast {
namespace {

// Takes the pending Python exception away and returns its first line; torch's go on with a trace of C++ calls.
std::string take_exception() {
    PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
    PyErr_Fetch(&type, &value, &trace);
    std::string text = "unknown error";
    if (value != nullptr) {
        if (PyObject* str = PyObject_Str(value)) {
            if (const char* utf8 = PyUnicode_AsUTF8(str)) text = utf8;
            Py_DECREF(str);
        }
    }
    PyErr_Clear();
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return text.substr(0, text.find('\n'));
}

PyObject* attribute_or_throw(PyObject* object, const char* name) {
    PyObject* found = PyObject_GetAttrString(object, name);
    if (found == nullptr) throw KernelError("torch has no attribute " + std::string(name) + ": " + take_exception());
    return found;
}

// An owned reference that ends with its scope.
struct Owned {
    PyObject* object;
    explicit Owned(PyObject* o) : object(o) {}
    ~Owned() { Py_XDECREF(object); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    explicit operator bool() const { return object != nullptr; }
};

bool read_integers(PyObject* tuple, std::int64_t* out, std::int32_t count) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count) return false;
    for (std::int32_t d = 0; d < count; ++d) out[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, d));
    return PyErr_Occurred() == nullptr;
}

// Takes the pending exception of a tensor that cannot be read away. Of a sparse one torch says that it has no storage.
std::string why_unreadable(PyObject* tensor) {
    std::string reason = PyErr_Occurred() != nullptr ? take_exception() : "it has no strided memory";
    const Owned layout(PyObject_GetAttrString(tensor, "layout"));
    const Owned name(layout ? PyObject_Str(layout.object) : nullptr);
    const char* utf8 = name ? PyUnicode_AsUTF8(name.object) : nullptr;
    PyErr_Clear();
    if (utf8 == nullptr || std::string_view(utf8) == "torch.strided") return reason;
    return std::string("its layout is ") + utf8;
}

}  // namespace

bool TensorView::contiguous() const {
    std::int64_t expected = 1;
    for (std::int32_t d = ndim - 1; d >= 0; --d) {
        if (shape[d] != 1 && strides[d] != expected) return false;
        expected *= shape[d];
    }
    return true;
}

bool TensorView::dense() const {
    if (numel <= 1 || contiguous()) return true;
    // Walk the dimensions from the smallest stride up: each must begin where the previous one's block ends.
    bool used[kMaxDimensions] = {};
    std::int64_t expected = 1;
    for (std::int32_t step = 0; step < ndim; ++step) {
        std::int32_t best = -1;
        for (std::int32_t d = 0; d < ndim; ++d) {
            if (!used[d] && shape[d] != 1 && strides[d] == expected) best = d;
        }
        if (best < 0) break;
        used[best] = true;
        expected *= shape[best];
    }
    return expected == numel;
}

bool TensorView::same_layout(const TensorView& other) const {
    if (ndim != other.ndim || numel != other.numel) return false;
    for (std::int32_t d = 0; d < ndim; ++d) {
        if (shape[d] != other.shape[d]) return false;
        if (shape[d] != 1 && strides[d] != other.strides[d]) return false;
    }
    return true;
}

void TensorReader::configure(PyObject* torch, bool use_exchange_api) {
    // Held for the life of the process, like the module itself.
    PyObject* tensor = attribute_or_throw(torch, "Tensor");
    PyObject* nn = attribute_or_throw(torch, "nn");
    parameter_type_ = reinterpret_cast<PyTypeObject*>(attribute_or_throw(nn, "Parameter"));
    Py_DECREF(nn);
    is_neg_ = attribute_or_throw(tensor, "is_neg");
    dtypes_[static_cast<int>(Dtype::float32)] = attribute_or_throw(torch, "float32");
    dtypes_[static_cast<int>(Dtype::bfloat16)] = attribute_or_throw(torch, "bfloat16");
    dtypes_[static_cast<int>(Dtype::float16)] = attribute_or_throw(torch, "float16");
    dtypes_[static_cast<int>(Dtype::uint8)] = attribute_or_throw(torch, "uint8");
    dtypes_[static_cast<int>(Dtype::int16)] = attribute_or_throw(torch, "int16");
    dtypes_[static_cast<int>(Dtype::float64)] = attribute_or_throw(torch, "float64");
    tensor_type_ = reinterpret_cast<PyTypeObject*>(tensor);
    tensor_from_object_ = nullptr;
    if (!use_exchange_api) return;
    const Owned capsule(PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__"));
    if (!capsule || !PyCapsule_IsValid(capsule.object, dlpack::kCapsuleName)) {
        PyErr_Clear();
        return;
    }
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.object, dlpack::kCapsuleName));
    while (api != nullptr && api->major != dlpack::kMajorVersion) api = api->previous;
    if (api != nullptr) tensor_from_object_ = api->tensor_from_object;
}

bool TensorReader::read(PyObject* tensor, TensorView& view, std::string& reason) const {
    if (tensor_from_object_ == nullptr) {
        if (read_attributes(tensor, view)) return true;
        reason = why_unreadable(tensor);
        return false;
    }
    dlpack::Tensor t;
    if (tensor_from_object_(tensor, &t) != 0) {
        reason = why_unreadable(tensor);
        return false;
    }
    if (t.ndim > kMaxDimensions) {
        reason = "it has more than 16 dimensions";
        return false;
    }
    view.data = static_cast<char*>(t.data) + t.byte_offset;
    view.ndim = t.ndim;
    view.numel = 1;
    for (std::int32_t d = 0; d < t.ndim; ++d) {
        view.shape[d] = t.shape[d];
        view.strides[d] = t.strides[d];
        view.numel *= t.shape[d];
    }
    view.dtype = Dtype::other;
    if (t.dtype_lanes == 1) {
        if (t.dtype_code == dlpack::kFloat && t.dtype_bits == 64) view.dtype = Dtype::float64;
        if (t.dtype_code == dlpack::kFloat && t.dtype_bits == 32) view.dtype = Dtype::float32;
        if (t.dtype_code == dlpack::kFloat && t.dtype_bits == 16) view.dtype = Dtype::float16;
        if (t.dtype_code == dlpack::kBfloat && t.dtype_bits == 16) view.dtype = Dtype::bfloat16;
        if (t.dtype_code == dlpack::kUnsigned && t.dtype_bits == 8) view.dtype = Dtype::uint8;
        if (t.dtype_code == dlpack::kSigned && t.dtype_bits == 16) view.dtype = Dtype::int16;
    }
    view.device = t.device_type == dlpack::kCpu    ? Device::cpu
                  : t.device_type == dlpack::kCuda ? Device::cuda
                                                   : Device::other;
    view.device_index = t.device_id;
    return true;
}

bool TensorReader::holds_values(PyObject* tensor, std::string& reason) const {
    const Owned negated(PyObject_CallOneArg(is_neg_, tensor));
    if (negated && negated.object == Py_False) return true;
    reason = negated ? "its values are negated lazily" : take_exception();
    return false;
}

bool TensorReader::read_attributes(PyObject* tensor, TensorView& view) const {
    const Owned dtype(PyObject_GetAttrString(tensor, "dtype"));
    const Owned device(PyObject_GetAttrString(tensor, "device"));
    const Owned shape(PyObject_GetAttrString(tensor, "shape"));
    if (!dtype || !device || !shape) return false;
    const Owned kind(PyObject_GetAttrString(device.object, "type"));
    const Owned index(PyObject_GetAttrString(device.object, "index"));
    const Owned strides(PyObject_CallMethod(tensor, "stride", nullptr));
    const Owned pointer(PyObject_CallMethod(tensor, "data_ptr", nullptr));
    if (!kind || !index || !strides || !pointer) return false;
    view.dtype = Dtype::other;
    for (int known = 0; known < static_cast<int>(Dtype::other); ++known) {
        if (dtype.object == dtypes_[known]) view.dtype = static_cast<Dtype>(known);
    }
    view.device = PyUnicode_CompareWithASCIIString(kind.object, "cpu") == 0    ? Device::cpu
                  : PyUnicode_CompareWithASCIIString(kind.object, "cuda") == 0 ? Device::cuda
                                                                               : Device::other;
    view.device_index = index.object == Py_None ? 0 : static_cast<std::int32_t>(PyLong_AsLong(index.object));
    view.data = PyLong_AsVoidPtr(pointer.object);
    const Py_ssize_t ndim = PyTuple_Check(shape.object) ? PyTuple_GET_SIZE(shape.object) : kMaxDimensions + 1;
    if (ndim > kMaxDimensions) return false;
    view.ndim = static_cast<std::int32_t>(ndim);
    if (!read_integers(shape.object, view.shape, view.ndim)) return false;
    if (!read_integers(strides.object, view.strides, view.ndim)) return false;
    view.numel = 1;
    for (std::int32_t d = 0; d < view.ndim; ++d) view.numel *= view.shape[d];
    return PyErr_Occurred() == nullptr;
}

}  // namespace lit_fast
