// Moves the gradients of one bucket into its flat memory, in one call. CPython only, like stepper.h.
//
// It holds numbers: where each parameter's elements lie, and the shapes and strides that its gradients must have. The
// parameters themselves come with every call.
#pragma once

#include "buckets.h"
#include "stepper.h"

namespace lit_fast {

class Packer {
  public:
    // params: sequence of tensors of any class, on one device. pieces: in which Piece::slot is a place in params; they
    // hold every element once. used_flags: of each parameter, wire places that tell whether it had a gradient. size:
    // wire elements of the bucket. names: of parameters, for messages; may be empty.
    Packer(PyObject* params, const std::vector<Piece>& pieces, const std::vector<std::vector<std::int64_t>>& used_flags,
           std::int64_t size, std::vector<std::string> names);

    bool ready(PyObject* params) const;
    // Writes all of `out`. aside: sequence beside params of tensors or None, or None. Returns the places of parameters
    // that had neither a gradient nor anything set aside. Everything is checked before anything is written.
    std::vector<std::int64_t> pack(PyObject* params, PyObject* out, double scale, PyObject* aside, bool release,
                                   const CudaContext* cuda);
    // p.grad = views[i], None for the places in `without`.
    void assign(PyObject* params, PyObject* views, std::vector<std::int64_t> without) const;

  private:
    struct Row {
        std::size_t slot;
        std::int64_t param_begin;  // negative: a flag
        std::int64_t begin, count, padded;
    };
    std::string named(std::size_t slot) const;
    // Its memory's address; throws why it cannot be packed.
    const void* read(PyObject* tensor, const char* what, std::size_t slot, const Span& out, const CudaContext* cuda,
                     Dtype& dtype) const;
    void check_apart(const void* data, Dtype dtype, const char* what, std::size_t slot, const Span& out) const;

    std::vector<TensorView> like_;  // of each parameter; its addresses are never used
    std::vector<Row> rows_;         // in the order of begin: all of the bucket
    std::vector<std::string> names_;
    std::int64_t size_;
    PackBatch batch_;  // of the call at hand; kept for its capacity
};

}  // namespace lit_fast
