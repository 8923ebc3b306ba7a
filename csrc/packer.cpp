#include "packer.h"

#include <algorithm>

#include "check.h"
#include "flat.h"
#include "python.h"

namespace lit_fast {
Packer::Packer(PyObject* params, const std::vector<Piece>& pieces,
               const std::vector<std::vector<std::int64_t>>& used_flags, std::int64_t size,
               std::vector<std::string> names)
    : names_(std::move(names)), size_(size) {
    const std::size_t count = length(params, "params");
    check(names_.empty() || names_.size() == count, "there is not one name for each parameter of the bucket.");
    check(used_flags.size() == count, "there is not one list of used flags for each parameter of the bucket.");
    for (std::size_t i = 0; i < count; ++i) {
        TensorView view;
        std::string cause;
        // Of any class: its memory is not touched, and its gradients must be plain.
        if (!torch_side().reader.read(item(params, i), view, cause)) {
            throw KernelError(named(i) + " cannot be read: " + cause + ".");
        }
        if (!view.dense()) {
            throw KernelError(named(i) + " (" + described(view) +
                              ") is not dense in memory, so that its gradient has no place in flat memory. Make it "
                              "contiguous.");
        }
        like_.push_back(view);
    }
    std::vector<std::int64_t> held(count, 0);
    for (const Piece& piece : pieces) {
        check(piece.slot >= 0 && static_cast<std::size_t>(piece.slot) < count, "a piece is of no parameter.");
        const auto slot = static_cast<std::size_t>(piece.slot);
        check(piece.count > 0 && piece.param_begin == held[slot], "the pieces of a parameter are not in its order.");
        held[slot] += piece.count;
        rows_.push_back({slot, piece.param_begin, piece.wire_begin, piece.count, 0});
    }
    for (std::size_t i = 0; i < count; ++i) {
        if (held[i] == like_[i].numel) continue;
        throw KernelError(named(i) + " has " + std::to_string(like_[i].numel) + " elements, and its pieces hold " +
                          std::to_string(held[i]) + ".");
    }
    for (std::size_t i = 0; i < count; ++i) {
        for (const std::int64_t at : used_flags[i]) rows_.push_back({i, -1, at, 1, 0});
    }
    std::sort(rows_.begin(), rows_.end(), [](const Row& a, const Row& b) { return a.begin < b.begin; });
    if (size > 0 && (rows_.empty() || rows_.front().begin > 0)) rows_.insert(rows_.begin(), {0, 0, 0, 0, 0});
    for (std::size_t r = 0; r < rows_.size(); ++r) {
        const std::int64_t next = r + 1 < rows_.size() ? rows_[r + 1].begin : size;
        rows_[r].padded = next - rows_[r].begin;
        check(rows_[r].begin >= 0 && rows_[r].count <= rows_[r].padded,
              "pieces or flags overlap, or end behind `size`.");
    }
}

std::string Packer::named(std::size_t slot) const {
    std::string text = "Parameter " + std::to_string(slot) + " of the bucket";
    if (slot < names_.size()) text += " (" + names_[slot] + ")";
    return text;
}

bool Packer::ready(PyObject* params) const {
    for (std::size_t i = 0; i < like_.size(); ++i) {
        PyObject* grad = checked(PyObject_GetAttr(item(params, i), grad_name()));
        Py_DECREF(grad);  // the parameter keeps it
        if (grad == Py_None) return false;
    }
    return true;
}

const void* Packer::read(PyObject* tensor, const char* what, std::size_t slot, const Span& out, const CudaContext* cuda,
                         Dtype& dtype) const {
    const TensorReader& reader = torch_side().reader;
    TensorView view;
    std::string cause;
    const auto refuse = [&](const std::string& why) { throw KernelError(named(slot) + ": its " + what + " " + why); };
    if (!reader.plain(tensor)) refuse("is a " + type_name(tensor) + ", not a plain tensor.");
    if (!reader.read(tensor, view, cause) || !reader.holds_values(tensor, cause)) {
        refuse("cannot be packed: " + cause +
               ". A bucket takes dense gradients: an embedding has those with sparse=False.");
    }
    cause = misplaced(view, cuda);
    if (!cause.empty()) refuse(cause + ".");
    if (!is_gradient_dtype(view.dtype)) {
        refuse("is " + std::string(name_of(view.dtype)) + "; float32, bfloat16 and float16 can be packed.");
    }
    if (!view.dense() || !like_[slot].same_layout(view)) {
        refuse("(" + described(view) + ") does not lie in memory as the parameter does (" + described(like_[slot]) +
               "). Copy it into a torch.empty_like of the parameter, as a hook may do.");
    }
    dtype = view.dtype;
    check_apart(view.data, view.dtype, what, slot, out);
    return view.data;
}

// A gradient in the bucket's own memory is scaled in place; anywhere else there it would be overwritten before it is
// read.
void Packer::check_apart(const void* data, Dtype dtype, const char* what, std::size_t slot, const Span& out) const {
    const auto* begin = static_cast<const char*>(data);
    const auto* end = begin + like_[slot].numel * bytes_of(dtype);
    const auto* out_begin = static_cast<const char*>(out.data);
    if (begin == end || end <= out_begin || out_begin + out.numel * bytes_of(out.dtype) <= begin) return;
    bool in_place = dtype == out.dtype;
    for (const Row& row : rows_) {
        if (row.slot != slot || row.param_begin < 0 || row.count == 0) continue;
        in_place = in_place && begin + row.param_begin * bytes_of(dtype) == out_begin + row.begin * bytes_of(dtype);
    }
    if (in_place) return;
    throw KernelError(named(slot) + ": its " + what + " lies in the bucket's memory, and not in its own place there.");
}

std::vector<std::int64_t> Packer::pack(PyObject* params, PyObject* out, double scale, PyObject* aside, bool release,
                                       const CudaContext* cuda) {
    struct Found {
        const void* grad = nullptr;
        const void* aside = nullptr;
        Dtype dtype = Dtype::float32;
    };
    batch_.rows.clear();
    batch_.out = flat(out, "out", cuda);
    batch_.scale = static_cast<float>(scale);
    if (batch_.out.numel != size_) {
        throw KernelError("out has " + std::to_string(batch_.out.numel) + " elements, and the bucket " +
                          std::to_string(size_) + ".");
    }
    if (aside != Py_None && length(aside, "aside") != like_.size()) {
        throw KernelError("aside has not one entry for each parameter of the bucket.");
    }
    References refs;
    std::vector<Found> found(like_.size());
    std::vector<std::int64_t> without;
    for (std::size_t i = 0; i < like_.size(); ++i) {
        PyObject* grad = refs.keep(checked(PyObject_GetAttr(item(params, i), grad_name())));
        if (grad != Py_None) found[i].grad = read(grad, "gradient", i, batch_.out, cuda, found[i].dtype);
        PyObject* before = aside == Py_None ? Py_None : item(aside, i);
        if (before == Py_None) {
            if (grad == Py_None) without.push_back(static_cast<std::int64_t>(i));
            continue;
        }
        Py_INCREF(before);
        refs.keep(before);
        Dtype dtype = Dtype::other;
        const void* data = read(before, "gradient that was set aside", i, batch_.out, cuda, dtype);
        if (grad == Py_None) {
            found[i].grad = data;
            found[i].dtype = dtype;
            continue;
        }
        if (dtype != found[i].dtype) {
            throw KernelError(named(i) + ": its gradient is " + name_of(found[i].dtype) +
                              ", and the one that was set aside " + name_of(dtype) + ".");
        }
        found[i].aside = data;
    }
    std::vector<bool> used(like_.size(), true);
    for (const std::int64_t i : without) used[static_cast<std::size_t>(i)] = false;
    for (const Row& row : rows_) {
        PackRow task;
        task.begin = row.begin;
        task.count = row.count;
        task.padded = row.padded;
        if (row.param_begin < 0) {
            task.fill = used[row.slot] ? 1.0F : 0.0F;
        } else if (row.count > 0 && used[row.slot]) {
            const Found& from = found[row.slot];
            const std::int64_t bytes = row.param_begin * bytes_of(from.dtype);
            task.dtype = from.dtype;
            task.grad = static_cast<const char*>(from.grad) + bytes;
            if (from.aside != nullptr) task.aside = static_cast<const char*>(from.aside) + bytes;
        }
        batch_.rows.push_back(task);
    }
    if (cuda == nullptr) {
        run(size_, [&](int threads) { cpu_pack(batch_, threads); });
    } else {
#if LIT_FAST_HAS_CUDA
        cuda_pack(batch_, cuda->on);
#else
        throw KernelError(kNoCuda);
#endif
    }
    increment_versions({out});
    if (!release) return without;
    for (std::size_t i = 0; i < like_.size(); ++i) {
        if (PyObject_SetAttr(item(params, i), grad_name(), Py_None) != 0) throw PythonError{};
    }
    return without;
}

void Packer::assign(PyObject* params, PyObject* views, std::vector<std::int64_t> without) const {
    if (length(views, "views") != like_.size()) {
        throw KernelError("views has not one entry for each parameter of the bucket.");
    }
    std::sort(without.begin(), without.end());
    std::size_t next = 0;  // in `without`
    for (std::size_t i = 0; i < like_.size(); ++i) {
        const bool none = next < without.size() && static_cast<std::size_t>(without[next]) == i;
        if (none) ++next;
        if (PyObject_SetAttr(item(params, i), grad_name(), none ? Py_None : item(views, i)) != 0) throw PythonError{};
    }
}

}  // namespace lit_fast
