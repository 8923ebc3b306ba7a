#include "flat.h"

#include <cmath>

#include "check.h"
#include "python.h"

namespace lit_fast {
namespace {

std::string text_of(const std::int64_t* numbers, std::int32_t count) {
    std::string text = "(";
    for (std::int32_t d = 0; d < count; ++d) text += (d > 0 ? ", " : "") + std::to_string(numbers[d]);
    return text + (count == 1 ? ",)" : ")");
}

TensorView read_plain(PyObject* tensor, const std::string& what, const CudaContext* cuda) {
    const TensorReader& reader = torch_side().reader;
    TensorView view;
    std::string cause;
    if (!reader.plain(tensor)) throw KernelError(what + " is a " + type_name(tensor) + ", not a plain tensor.");
    if (!reader.read(tensor, view, cause)) throw KernelError(what + " cannot be read: " + cause + ".");
    cause = misplaced(view, cuda);
    if (!cause.empty()) throw KernelError(what + " " + cause + ".");
    return view;
}

const char* end_of(const Span& span) { return static_cast<const char*>(span.data) + span.numel * bytes_of(span.dtype); }

bool apart(const Span& a, const Span& b) { return end_of(a) <= b.data || end_of(b) <= a.data; }

double* partials_of(PyObject* tensor, const CudaContext* cuda, std::int64_t& count) {
    const TensorView view = read_plain(tensor, "partials", cuda);
    if (view.dtype != Dtype::float64 || !view.contiguous()) {
        throw KernelError("partials (" + described(view) + ") is not contiguous float64.");
    }
    count = view.numel;
    return static_cast<double*>(view.data);
}

}  // namespace

const char* name_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::float32:
            return "float32";
        case Dtype::bfloat16:
            return "bfloat16";
        case Dtype::float16:
            return "float16";
        case Dtype::uint8:
            return "uint8";
        case Dtype::int16:
            return "int16";
        case Dtype::float64:
            return "float64";
        case Dtype::other:
            break;
    }
    return "of another dtype";
}

bool is_gradient_dtype(Dtype dtype) { return static_cast<int>(dtype) < kDtypeCount; }

std::string described(const TensorView& view) {
    return "shape " + text_of(view.shape, view.ndim) + ", strides " + text_of(view.strides, view.ndim) + ", " +
           name_of(view.dtype);
}

std::size_t length(PyObject* sequence, const char* what) {
    if (!PyTuple_Check(sequence) && !PyList_Check(sequence)) {
        throw KernelError(std::string(what) + " is a " + type_name(sequence) + ", not a list or tuple.");
    }
    return static_cast<std::size_t>(PySequence_Fast_GET_SIZE(sequence));
}

PyObject* item(PyObject* sequence, std::size_t i) {
    return PySequence_Fast_GET_ITEM(sequence, static_cast<Py_ssize_t>(i));
}

Span flat(PyObject* tensor, const char* what, const CudaContext* cuda) {
    const TensorView view = read_plain(tensor, what, cuda);
    if (!is_gradient_dtype(view.dtype) || !view.contiguous()) {
        throw KernelError(std::string(what) + " (" + described(view) +
                          ") is not contiguous float32, bfloat16 or float16.");
    }
    return {view.data, view.numel, view.dtype};
}

void unpack(PyObject* from, PyObject* out, double scale, const CudaContext* cuda) {
    const Span source = flat(from, "flat_in", cuda), target = flat(out, "flat_out", cuda);
    if (source.numel != target.numel) {
        throw KernelError("flat_in has " + std::to_string(source.numel) + " elements, and flat_out " +
                          std::to_string(target.numel) + ".");
    }
    const bool in_place = source.data == target.data && source.dtype == target.dtype;
    if (!in_place && !apart(source, target)) {
        throw KernelError("flat_in and flat_out share memory, and are not the same.");
    }
    PackBatch batch;
    batch.out = target;
    batch.scale = static_cast<float>(scale);
    PackRow row;
    row.grad = source.data;
    row.count = row.padded = source.numel;
    row.dtype = source.dtype;
    if (source.numel > 0) batch.rows.push_back(row);
    if (cuda == nullptr) {
        run(source.numel, [&](int threads) { cpu_pack(batch, threads); });
    } else {
#if LIT_FAST_HAS_CUDA
        cuda_pack(batch, cuda->on);
#else
        throw KernelError(kNoCuda);
#endif
    }
    increment_versions({out});
}

void sum_pieces(PyObject* pieces, PyObject* out, double scale, const CudaContext* cuda) {
    const TensorView view = read_plain(pieces, "pieces", cuda);
    const Span sum = flat(out, "out", cuda);
    const bool rows = view.ndim == 2 && view.shape[0] > 0 && (view.shape[1] <= 1 || view.strides[1] == 1);
    if (!rows || !is_gradient_dtype(view.dtype) || view.shape[1] != sum.numel) {
        throw KernelError("pieces (" + described(view) + ") are not one row or more of " + std::to_string(sum.numel) +
                          " contiguous elements, as out has, of float32, bfloat16 or float16.");
    }
    PieceSum task;
    task.first = view.data;
    task.dtype = view.dtype;
    task.pieces = view.shape[0];
    task.stride = view.strides[0];
    task.out = sum;
    task.scale = static_cast<float>(scale);
    const Span all{view.data, (task.pieces - 1) * task.stride + sum.numel, view.dtype};
    check(task.stride >= 0 && (sum.numel == 0 || apart(all, sum)), "pieces and out share memory.");
    if (cuda == nullptr) {
        run(view.numel, [&](int threads) { cpu_sum_pieces(task, threads); });
    } else {
#if LIT_FAST_HAS_CUDA
        cuda_sum_pieces(task, cuda->on);
#else
        throw KernelError(kNoCuda);
#endif
    }
    increment_versions({out});
}

void squares(PyObject* values, const std::vector<std::int64_t>& places, PyObject* partials, const CudaContext* cuda) {
    SquareBatch batch;
    std::int64_t room = 0, elements = 0;
    batch.partials = partials_of(partials, cuda, room);
    check(length(values, "values") == places.size(), "there is not one place for each of values.");
    for (std::size_t i = 0; i < places.size(); ++i) {
        const std::string what = "values[" + std::to_string(i) + "]";
        const TensorView view = read_plain(item(values, i), what, cuda);
        if (!is_gradient_dtype(view.dtype) || !view.dense()) {
            throw KernelError(what + " (" + described(view) +
                              ") is neither float32, bfloat16 nor float16, or not dense in memory.");
        }
        const std::int64_t chunks = (view.numel + kSquareChunk - 1) / kSquareChunk;
        if (places[i] < 0 || places[i] + chunks > room) {
            throw KernelError(what + " has " + std::to_string(chunks) + " partial sums from " +
                              std::to_string(places[i]) + " on, and partials has room for " + std::to_string(room) +
                              ".");
        }
        elements += view.numel;
        batch.values.push_back({view.data, view.numel, view.dtype});
        batch.places.push_back(places[i]);
    }
    if (cuda == nullptr) {
        run(elements, [&](int threads) { cpu_squares(batch, threads); });
    } else {
#if LIT_FAST_HAS_CUDA
        cuda_squares(batch, cuda->on);
#else
        throw KernelError(kNoCuda);
#endif
    }
    increment_versions({partials});
}

double norm_of(PyObject* partials, double scale, const CudaContext* cuda) {
    std::int64_t count = 0;
    const double* values = partials_of(partials, cuda, count);
    if (cuda == nullptr) {
        double sum = 0.0;
        for (std::int64_t i = 0; i < count; ++i) sum += values[i];
        return std::sqrt(sum) * std::fabs(scale);
    }
#if LIT_FAST_HAS_CUDA
    CudaClip clip;
    clip.norm = static_cast<float*>(pointer_of(cuda->norm));
    clip.norm_scale = std::fabs(scale);
    if (cuda->factor != Py_None) clip.factor = static_cast<const float*>(pointer_of(cuda->factor));
    cuda_norm_of(values, count, clip, cuda->on);
    return 0.0;
#else
    throw KernelError(kNoCuda);
#endif
}

}  // namespace lit_fast
