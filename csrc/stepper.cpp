#include "stepper.h"

#include <cmath>

#include "python.h"

namespace lit_fast {
namespace {

GradientScale scale_without_norm(const Clipping& clipping) {
    GradientScale scale;
    scale.scale = static_cast<float>(clipping.grad_scale);
    if (clipping.clip_value >= 0.0) scale.limit = static_cast<float>(clipping.clip_value);
    return scale;
}

// Gradients, norm, and clip coefficient on the CPU.
GradientScale cpu_clip(const std::vector<Span>& grads, std::int64_t elements, const Clipping& clipping, bool with_norm,
                       StepResult& result) {
    GradientScale scale = scale_without_norm(clipping);
    if (with_norm) {
        double sum = 0.0;
        run(elements, [&](int threads) { sum = cpu_sum_of_squares(grads, threads); });
        result.has_norm = true;
        result.norm = std::sqrt(sum) * std::fabs(clipping.grad_scale);
    }
    if (clipping.max_norm >= 0.0) {
        scale.scale *= clip_coefficient(static_cast<float>(result.norm), static_cast<float>(clipping.max_norm));
    }
    return scale;
}

#if LIT_FAST_HAS_CUDA
CudaClip cuda_clip(const Clipping& clipping, bool with_norm, const CudaContext& cuda) {
    CudaClip clip;
    clip.scale = scale_without_norm(clipping);
    if (cuda.factor != Py_None) clip.factor = static_cast<const float*>(pointer_of(cuda.factor));
    if (cuda.skips()) clip.skipped = static_cast<std::int64_t*>(pointer_of(cuda.skipped));
    clip.for_good = cuda.for_good;
    if (!with_norm) return clip;
    clip.norm = static_cast<float*>(pointer_of(cuda.norm));
    clip.norm_scale = std::fabs(clipping.grad_scale);
    clip.max_norm = static_cast<float>(clipping.max_norm);
    return clip;
}

// Kept in `refs` until the queueing is done: torch's allocator hands it out again in the stream's order only.
CudaWorkspace workspace_of(const CudaContext& cuda, References& refs) {
    return [&](std::int64_t words) {
        PyObject* size = refs.keep(checked(PyLong_FromLongLong(words)));
        return pointer_of(refs.keep(checked(PyObject_CallOneArg(cuda.workspace, size))));
    };
}
#endif

}  // namespace

void increment_versions(const std::vector<PyObject*>& tensors) {
    if (tensors.empty()) return;
    PyObject* list = checked(PyList_New(static_cast<Py_ssize_t>(tensors.size())));
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        Py_INCREF(tensors[i]);
        PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), tensors[i]);
    }
    PyObject* none = PyObject_CallOneArg(torch_side().increment_version, list);
    Py_DECREF(list);
    Py_DECREF(checked(none));
}

Torch& torch_side() {
    static Torch torch;
    return torch;
}

Stepper::Stepper(Mapping mapping) : mapping_(mapping), info_(&formula_info(mapping.formula)) {
    batch_.formula = mapping.formula;
    check(PyTuple_GET_SIZE(mapping_.state_keys) == info_->state_count,
          "the mapping's state keys do not match the formula's states.");
}

Stepper::~Stepper() {
    for (PyObject* object : {mapping_.option_keys, mapping_.refused_keys, mapping_.state_keys, mapping_.code_keys,
                             mapping_.scale_keys, mapping_.step_key, mapping_.init_state}) {
        Py_XDECREF(object);
    }
}

StepResult Stepper::step(PyObject* param_groups, PyObject* state, const Clipping& clipping, const CudaContext* cuda) {
    return collected(param_groups, state, cuda, cuda != nullptr && cuda->skips(), [&](StepResult& result) {
        const bool with_norm = clipping.max_norm >= 0.0 || clipping.only_finite;
        if (cuda == nullptr) {
            const GradientScale scale = cpu_clip(grads_, elements_, clipping, with_norm, result);
            if (clipping.only_finite && !std::isfinite(result.norm)) return false;
            run(elements_, [&](int threads) { cpu_step(batch_, scale, threads); });
            return true;
        }
#if LIT_FAST_HAS_CUDA
        const CudaClip clip = cuda_clip(clipping, with_norm || cuda->skips(), *cuda);
        // The norm of nothing is 0 times the factor.
        const bool unread = cuda->told && !with_norm;
        cuda_step(batch_, unread ? std::vector<Span>{} : grads_, clip, workspace_of(*cuda, refs_), cuda->on);
        return true;
#else
        throw KernelError("this build has no CUDA kernels; build with LIT_FAST_CUDA=on.");
#endif
    });
}

std::string Gradients::collect(PyObject* param_groups, const CudaContext* cuda) {
    std::string refusal;
    for_each_group(param_groups, [&](PyObject*, PyObject* params, Py_ssize_t) {
        for (Py_ssize_t i = 0; refusal.empty() && i < PyList_GET_SIZE(params); ++i) {
            PyObject* grad = refs.keep(checked(PyObject_GetAttr(PyList_GET_ITEM(params, i), grad_name())));
            if (grad == Py_None) continue;
            TensorView view;
            std::string cause;
            if (!torch_side().reader.plain(grad)) {
                refusal = "a gradient is a " + type_name(grad) + ", not a plain tensor";
            } else if (!torch_side().reader.read(grad, view, cause) || !torch_side().reader.holds_values(grad, cause)) {
                refusal = "a gradient cannot be read: " + cause;
            } else if (!(cause = misplaced(view, cuda)).empty()) {
                refusal = "a gradient " + cause;
            } else if (static_cast<int>(view.dtype) >= kDtypeCount || !view.dense()) {
                refusal = "a gradient is neither float32, bfloat16 nor float16, or not dense in memory";
            }
            elements += view.numel;
            spans.push_back({view.data, view.numel, view.dtype});
            tensors.push_back(grad);
        }
    });
    return refusal;
}

StepResult gradient_norm(PyObject* param_groups, const Clipping& clipping, bool rewrite, const CudaContext* cuda) {
    Gradients grads;
    StepResult result;
    result.refusal = grads.collect(param_groups, cuda);
    if (!result.refusal.empty()) return result;
    const bool with_norm = clipping.max_norm >= 0.0 || !rewrite;
    if (cuda == nullptr) {
        const GradientScale scale = cpu_clip(grads.spans, grads.elements, clipping, with_norm, result);
        if (rewrite) run(grads.elements, [&](int threads) { cpu_scale(grads.spans, scale, threads); });
    } else {
#if LIT_FAST_HAS_CUDA
        const CudaClip clip = cuda_clip(clipping, with_norm, *cuda);
        if (with_norm) cuda_norm(grads.spans, clip, workspace_of(*cuda, grads.refs), cuda->on);
        if (rewrite) cuda_scale(grads.spans, clip, cuda->on);
#else
        throw KernelError("this build has no CUDA kernels; build with LIT_FAST_CUDA=on.");
#endif
    }
    if (rewrite) increment_versions(grads.tensors);
    return result;
}

void release_gradients(PyObject* param_groups) {
    for_each_group(param_groups, [](PyObject*, PyObject* params, Py_ssize_t) {
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
            if (PyObject_SetAttr(PyList_GET_ITEM(params, i), grad_name(), Py_None) != 0) throw PythonError{};
        }
    });
}

}  // namespace lit_fast
