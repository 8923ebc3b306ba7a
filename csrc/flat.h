// What is done with flat memory beside packing it (packer.h): tensors are read, checked and handed to the kernels.
// CPython only. cuda: nullptr for the CPU.
#pragma once

#include "stepper.h"

namespace lit_fast {

constexpr const char* kNoCuda = "this build has no CUDA kernels; build with LIT_FAST_CUDA=on.";

// out <- scale * from, of the same number of elements; may be the same memory.
void unpack(PyObject* from, PyObject* out, double scale, const CudaContext* cuda);
// out [n] <- scale * (the sum over rows of pieces [rows, n], in float32 and in their order)
void sum_pieces(PyObject* pieces, PyObject* out, double scale, const CudaContext* cuda);
// partials[places[i] + k] <- the sum of squares of the k-th kSquareChunk elements of values[i]
void squares(PyObject* values, const std::vector<std::int64_t>& places, PyObject* partials, const CudaContext* cuda);
// The root of the sum of all, in their order, times the magnitude of scale. With CUDA it is left in the context's norm,
// times that of the context's factor; what is returned means nothing then.
double norm_of(PyObject* partials, double scale, const CudaContext* cuda);

// Contiguous, float32, bfloat16 or float16, on the CPU or the context's device.
Span flat(PyObject* tensor, const char* what, const CudaContext* cuda);

// ---- for messages, and of lists and tuples ----

const char* name_of(Dtype dtype);
bool is_gradient_dtype(Dtype dtype);
std::string described(const TensorView& view);  // shape, strides and dtype
std::size_t length(PyObject* sequence, const char* what);
PyObject* item(PyObject* sequence, std::size_t i);  // borrowed

}  // namespace lit_fast
