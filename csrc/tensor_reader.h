// Reads where a torch tensor lies, anew at every call. CPython and DLPack only; no torch header.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

#include "dlpack.h"
#include "dtypes.h"

namespace lit_fast {

enum class Device : std::int32_t { cpu, cuda, other };
constexpr int kMaxDimensions = 16;

// Borrowed from the tensor object: valid only while the caller holds a reference to it.
struct TensorView {
    void* data = nullptr;
    std::int64_t numel = 0;
    Dtype dtype = Dtype::other;
    Device device = Device::other;
    std::int32_t device_index = 0;
    std::int32_t ndim = 0;
    std::int64_t shape[kMaxDimensions];
    std::int64_t strides[kMaxDimensions];

    bool contiguous() const;
    // Every element of one block of memory exactly once, in any order of dimensions.
    bool dense() const;
    bool same_layout(const TensorView& other) const;
    std::int64_t bytes() const { return numel * bytes_of(dtype); }
};

class TensorReader {
  public:
    // torch: the module. use_exchange_api: whether to read through DLPack's C exchange where torch has it; otherwise
    // tensors are read through Python attributes.
    void configure(PyObject* torch, bool use_exchange_api);
    bool configured() const { return tensor_type_ != nullptr; }
    const char* path() const { return tensor_from_object_ != nullptr ? "DLPack C exchange" : "Python attributes"; }

    // A plain torch.Tensor or torch.nn.Parameter, whose memory is what its attributes say; subclasses may differ.
    bool plain(PyObject* object) const { return Py_TYPE(object) == tensor_type_ || Py_TYPE(object) == parameter_type_; }

    // False, with the cause in `reason` and no Python exception set, where the tensor has no strided memory.
    bool read(PyObject* tensor, TensorView& view, std::string& reason) const;

    // Whether its memory holds its values: not so under torch's lazy negation (z.conj().imag), which DLPack exports
    // without a word.
    bool holds_values(PyObject* tensor, std::string& reason) const;

  private:
    bool read_attributes(PyObject* tensor, TensorView& view) const;

    PyTypeObject* tensor_type_ = nullptr;
    PyTypeObject* parameter_type_ = nullptr;
    PyObject* is_neg_ = nullptr;                             // torch.Tensor.is_neg
    PyObject* dtypes_[static_cast<int>(Dtype::other)] = {};  // torch's, by ours
    int (*tensor_from_object_)(void*, dlpack::Tensor*) = nullptr;
};

}  // namespace lit_fast
