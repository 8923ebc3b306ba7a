// The Python module lit_fast._core. The only file that knows pybind11; lit_fast/ops.py is its only importer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend.h"
#include "buckets.h"
#include "check.h"
#include "flat.h"
#include "formulas/storage.h"
#include "memory.h"
#include "packer.h"
#include "stepper.h"
#include "threads.h"
#include "timed.h"

namespace py = pybind11;
namespace lf = lit_fast;

namespace {

template <class Call>
auto python_errors(const Call& call) {
    try {
        return call();
    } catch (const lf::PythonError&) {
        throw py::error_already_set();
    }
}

lf::FormulaId formula_named(const std::string& name) {
    for (int i = 0; i < lf::kFormulaCount; ++i) {
        const auto id = static_cast<lf::FormulaId>(i);
        if (name == lf::formula_info(id).name) return id;
    }
    throw lf::KernelError("There is no formula " + name + " in csrc/formulas/all.h.");
}

// norm (float), None when none was asked for, or the reason (str) why nothing was done
py::object result_object(const lf::StepResult& result) {
    if (!result.refusal.empty()) return py::str(result.refusal);
    if (result.has_norm) return py::float_(static_cast<double>(static_cast<float>(result.norm)));
    return py::none();
}

// cuda: (device index, stream handle, norm tensor or None, workspace callable, factor tensor or None, tensor that
// counts skipped steps or None, whether all are skipped after the first, whether a CUDA graph is being captured,
// whether the factor says which are skipped), torch's current ones; None for the CPU.
struct CudaArgument {
    lf::CudaContext context;
    bool given;

    explicit CudaArgument(const py::object& cuda) : given(!cuda.is_none()) {
        if (!given) return;
        const auto parts = cuda.cast<py::tuple>();
        context.on.device = parts[0].cast<int>();
        context.on.stream = reinterpret_cast<void*>(parts[1].cast<std::uintptr_t>());
        norm = parts[2];
        workspace = parts[3];
        factor = parts[4];
        skipped = parts[5];
        context.norm = norm.ptr();
        context.workspace = workspace.ptr();
        context.factor = factor.ptr();
        context.skipped = skipped.ptr();
        context.for_good = parts[6].cast<bool>();
        context.capturing = parts[7].cast<bool>();
        context.told = parts[8].cast<bool>();
    }
    const lf::CudaContext* get() const { return given ? &context : nullptr; }

  private:
    py::object norm, workspace, factor, skipped;
};

// Where tensors must lie: a CUDA device, or the CPU (-1).
struct Place {
    lf::CudaContext context;
    bool cuda;

    explicit Place(int device, bool capturing = false) : cuda(device >= 0) {
        context.on.device = device;
        context.capturing = capturing;
    }
    const lf::CudaContext* get() const { return cuda ? &context : nullptr; }
};

// (device index, stream handle), torch's current ones; None for the CPU.
struct StreamArgument {
    lf::CudaContext context;
    bool cuda;

    explicit StreamArgument(const py::object& stream) : cuda(!stream.is_none()) {
        if (!cuda) return;
        const auto parts = stream.cast<py::tuple>();
        context.on.device = parts[0].cast<int>();
        context.on.stream = reinterpret_cast<void*>(parts[1].cast<std::uintptr_t>());
    }
    const lf::CudaContext* get() const { return cuda ? &context : nullptr; }
};

std::unique_ptr<lf::Stepper> make_stepper(const std::string& formula, const py::tuple& option_keys,
                                          const py::tuple& refused_keys, const py::tuple& state_keys,
                                          const py::tuple& code_keys, const py::tuple& scale_keys,
                                          const py::object& step_key, const py::object& init_state) {
    lf::Mapping mapping;
    mapping.formula = formula_named(formula);
    mapping.option_keys = option_keys.inc_ref().ptr();
    mapping.refused_keys = refused_keys.inc_ref().ptr();
    mapping.state_keys = state_keys.inc_ref().ptr();
    mapping.code_keys = code_keys.inc_ref().ptr();
    mapping.scale_keys = scale_keys.inc_ref().ptr();
    mapping.step_key = step_key.inc_ref().ptr();
    mapping.init_state = init_state.inc_ref().ptr();
    return std::make_unique<lf::Stepper>(mapping);
}

// [(segment, stride, [(index, offset)], [(slot, param_begin, wire_begin, count)])]
py::list lay_out_buckets(const std::vector<std::int64_t>& numels, std::int64_t first_capacity, std::int64_t capacity,
                         std::int64_t segments, std::int64_t flags, std::int64_t last_flags) {
    py::list buckets;
    for (const lf::BucketLayout& layout :
         lf::lay_out_buckets(numels, {first_capacity, capacity, segments, flags, last_flags})) {
        py::list slots, pieces;
        for (const lf::Slot& slot : layout.slots) slots.append(py::make_tuple(slot.index, slot.offset));
        for (const lf::Piece& piece : layout.pieces) {
            pieces.append(py::make_tuple(piece.slot, piece.param_begin, piece.wire_begin, piece.count));
        }
        buckets.append(py::make_tuple(layout.segment, layout.stride, slots, pieces));
    }
    return buckets;
}

using PieceNumbers = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

std::unique_ptr<lf::Packer> make_packer(const py::tuple& params, const std::vector<PieceNumbers>& numbers,
                                        const std::vector<std::vector<std::int64_t>>& used_flags, std::int64_t size,
                                        std::vector<std::string> names) {
    std::vector<lf::Piece> pieces;
    for (const auto& [slot, param_begin, wire_begin, count] : numbers) {
        pieces.push_back({slot, param_begin, wire_begin, count});
    }
    return python_errors(
        [&] { return std::make_unique<lf::Packer>(params.ptr(), pieces, used_flags, size, std::move(names)); });
}

// (count, total, minimum, maximum, {index: count})
py::tuple histogram_object(const lf::Histogram& histogram) {
    py::dict buckets;
    for (std::size_t index = 0; index < histogram.buckets.size(); ++index) {
        if (histogram.buckets[index] > 0) buckets[py::int_(index)] = histogram.buckets[index];
    }
    return py::make_tuple(histogram.count, histogram.total, histogram.minimum, histogram.maximum, buckets);
}

// The thread that is timed goes on meanwhile.
template <class Read>
auto without_interpreter(const Read& read) {
    const py::gil_scoped_release released;
    return read();
}

// Everything in nanoseconds, see _core.pyi.
py::dict clock_reading(lf::PhaseClock& clock) {
    const lf::ClockRecord record = without_interpreter([&] { return clock.read(); });
    py::list slots, per_step, slowest;
    for (const lf::ClockSlot& slot : record.slots) {
        slots.append(py::make_tuple(slot.phase, slot.total, slot.calls, slot.longest));
    }
    for (const lf::Histogram& histogram : record.per_step) per_step.append(histogram_object(histogram));
    for (const lf::SlowStep& slow : record.slowest) {
        slowest.append(py::make_tuple(slow.step, slow.duration, slow.begin, slow.phases, slow.interruptions,
                                      slow.longest_slot, slow.longest));
    }
    py::dict reading;
    reading["wall"] = record.wall();
    reading["steps_begun"] = record.step + 1;
    reading["slots"] = slots;
    reading["steps"] = histogram_object(record.steps);
    reading["per_step"] = per_step;
    reading["slowest"] = slowest;
    reading["interruptions"] = record.interruptions;
    return reading;
}

py::list clock_spans(lf::PhaseClock& clock, std::int64_t steps) {
    py::list spans;
    for (const lf::TimedSpan& span : without_interpreter([&] { return clock.spans(steps); })) {
        spans.append(py::make_tuple(span.slot, span.step, span.begin, span.duration));
    }
    return spans;
}

// A new object of one of the clock's types, for a slot that the clock has.
template <class Make>
py::object timed(const py::handle& owner, int slot, const Make& make) {
    auto* clock = owner.cast<lf::PhaseClock*>();
    lf::check(clock->has_slot(slot), "the clock has no such slot.");
    PyObject* object = make(owner.ptr(), clock);
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
}

py::dict formulas() {
    py::dict all;
    for (int i = 0; i < lf::kFormulaCount; ++i) {
        const lf::FormulaInfo& info = lf::formula_info(static_cast<lf::FormulaId>(i));
        py::list options, states;
        for (int k = 0; k < info.option_count; ++k) options.append(info.option_names[k]);
        for (int k = 0; k < info.state_count; ++k) states.append(info.state_names[k]);
        py::dict entry;
        entry["options"] = options;
        entry["states"] = states;
        entry["counts_steps"] = info.counts_steps;
        all[info.name] = entry;
    }
    return all;
}

py::dict build_info() {
    py::dict info;
    py::list built, supported;
    for (const lf::CpuTarget& target : lf::cpu_targets()) {
        built.append(target.name);
        if (target.supported()) supported.append(target.name);
    }
    info["cpu_targets_built"] = built;
    info["cpu_targets_supported"] = supported;
    info["cpu_target"] = lf::chosen_cpu_target().target.name;
    info["cpu_target_reason"] = lf::chosen_cpu_target().reason;
    info["compiler"] = LIT_FAST_COMPILER;
    info["architecture"] = LIT_FAST_ARCHITECTURE;
    info["cuda"] = static_cast<bool>(LIT_FAST_HAS_CUDA);
    info["cuda_reason"] = LIT_FAST_CUDA_REASON;
    info["threads"] = lf::threading_description();
    info["tensor_access"] = lf::torch_side().reader.configured() ? lf::torch_side().reader.path() : "not set up";
    info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
    return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Compiled kernels of lit_fast. Use lit_fast.ops.";
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const lf::KernelError& e) {
            const py::object type = py::module_::import("lit_fast.errors").attr("KernelError");
            py::set_error(type, e.what());
        }
    });

    m.def("configure", [](const py::object& torch, bool use_exchange_api, const py::object& increment_version,
                          const py::object& num_threads, std::int64_t vector_width) {
        lf::Torch& side = lf::torch_side();
        side.reader.configure(torch.ptr(), use_exchange_api);
        side.increment_version = increment_version.inc_ref().ptr();
        side.num_threads = num_threads.inc_ref().ptr();
        side.vector_width = vector_width;
    });
    m.def("find_openmp", &lf::find_openmp);
    m.def("choose_cpu_target", &lf::choose_cpu_target);
    m.def("build_info", &build_info);
    m.def("formulas", &formulas);
    m.def("keep_freed_memory", [](bool keep) {
        const lf::AllocatorReport report = lf::keep_freed_memory(keep);
        return py::make_tuple(report.applied, report.what);
    });

    py::class_<lf::Stepper>(m, "Stepper")
        .def(py::init(&make_stepper))
        .def("step",
             [](lf::Stepper& self, const py::handle& param_groups, const py::handle& state, double grad_scale,
                double max_norm, double clip_value) {
                 const lf::Clipping clipping{grad_scale, max_norm, clip_value};
                 return python_errors(
                     [&] { return result_object(self.step(param_groups.ptr(), state.ptr(), clipping, nullptr)); });
             })
        .def("step_if_finite",
             [](lf::Stepper& self, const py::handle& param_groups, const py::handle& state, double grad_scale,
                double max_norm, double clip_value) -> py::object {
                 const lf::Clipping clipping{grad_scale, max_norm, clip_value, true};
                 const lf::StepResult result =
                     python_errors([&] { return self.step(param_groups.ptr(), state.ptr(), clipping, nullptr); });
                 if (!result.refusal.empty()) return py::str(result.refusal);
                 return py::float_(result.norm);
             })
        .def("step_on_cuda",
             [](lf::Stepper& self, const py::handle& param_groups, const py::handle& state, double grad_scale,
                double max_norm, double clip_value, const py::object& cuda) {
                 const lf::Clipping clipping{grad_scale, max_norm, clip_value};
                 const CudaArgument context(cuda);
                 return python_errors([&] {
                     return result_object(self.step(param_groups.ptr(), state.ptr(), clipping, context.get()));
                 });
             })
        .def("hand_over",
             [](lf::Stepper& self, const py::handle& param_groups, const py::handle& state, int cuda_device,
                std::int64_t chunk, bool skips, const py::handle& launch) {
                 const Place place(cuda_device);
                 return python_errors([&] {
                     return result_object(
                         self.hand_over(param_groups.ptr(), state.ptr(), {launch.ptr(), chunk, skips}, place.get()));
                 });
             })
        .def("check_step",
             [](lf::Stepper& self, const py::handle& param_groups, const py::handle& state, bool by_table,
                int cuda_device, bool capturing) {
                 const Place place(cuda_device, capturing);
                 return python_errors(
                     [&] { return self.check_step(param_groups.ptr(), state.ptr(), by_table, place.get()); });
             })
        .def("check_parameters",
             [](lf::Stepper& self, const py::handle& param_groups, bool by_table, bool on_cuda, int device_index) {
                 return python_errors(
                     [&] { return self.check_parameters(param_groups.ptr(), by_table, on_cuda, device_index); });
             });
    py::class_<lf::Packer>(m, "Packer")
        .def(py::init(&make_packer))
        .def("ready", [](const lf::Packer& self,
                         const py::tuple& params) { return python_errors([&] { return self.ready(params.ptr()); }); })
        .def("pack",
             [](lf::Packer& self, const py::tuple& params, const py::object& stream, const py::handle& out,
                double scale, const py::handle& aside, bool release) {
                 const StreamArgument on(stream);
                 return python_errors(
                     [&] { return self.pack(params.ptr(), out.ptr(), scale, aside.ptr(), release, on.get()); });
             })
        .def("assign", [](const lf::Packer& self, const py::tuple& params, const py::handle& views,
                          const std::vector<std::int64_t>& without) {
            python_errors([&] { return self.assign(params.ptr(), views.ptr(), without), 0; });
        });
    py::class_<lf::PhaseClock>(m, "PhaseClock")
        .def(py::init<int, int, int, int>())
        .def("add_part", &lf::PhaseClock::add_part)
        .def("start",
             [](lf::PhaseClock& self, int slot) {
                 lf::check(self.has_slot(slot), "the clock has no such slot.");
                 self.start(slot);
             })
        .def("stop", &lf::PhaseClock::stop)
        .def("begin_child", &lf::PhaseClock::begin_child)
        .def("end_step", &lf::PhaseClock::end_step)
        .def("pause",
             [](lf::PhaseClock& self, int slot) {
                 lf::check(self.has_slot(slot), "the clock has no such slot.");
                 self.pause(slot);
             })
        .def("resume", &lf::PhaseClock::resume)
        .def("interrupted",
             [](lf::PhaseClock& self, int kind, lf::Nanoseconds duration) {
                 if (self.times_this_thread()) self.interrupted(kind, duration);
             })
        .def("wrap",
             [](const py::handle& self, int slot, const py::handle& function) {
                 return timed(self, slot, [&](PyObject* owner, lf::PhaseClock* clock) {
                     return lf::timed_call(owner, clock, slot, function.ptr());
                 });
             })
        .def("items",
             [](const py::handle& self, int slot, const py::handle& iterator, bool steps, const py::handle& first) {
                 lf::check(PyIter_Check(iterator.ptr()) != 0, "an iterator is wanted.");
                 return timed(self, slot, [&](PyObject* owner, lf::PhaseClock* clock) {
                     return lf::timed_items(owner, clock, slot, iterator.ptr(), steps, first.ptr());
                 });
             })
        .def("block",
             [](const py::handle& self, int slot) {
                 return timed(self, slot, [&](PyObject* owner, lf::PhaseClock* clock) {
                     return lf::timed_block(owner, clock, slot);
                 });
             })
        .def("read", &clock_reading)
        .def("spans", &clock_spans);
    m.def("bucket_of", &lf::bucket_of);
    m.def("lay_out_buckets", &lay_out_buckets);
    m.def("unpack", [](const py::handle& from, const py::handle& out, double scale, const py::object& stream) {
        const StreamArgument on(stream);
        python_errors([&] { return lf::unpack(from.ptr(), out.ptr(), scale, on.get()), 0; });
    });
    m.def("sum_pieces", [](const py::handle& pieces, const py::handle& out, double scale, const py::object& stream) {
        const StreamArgument on(stream);
        python_errors([&] { return lf::sum_pieces(pieces.ptr(), out.ptr(), scale, on.get()), 0; });
    });
    m.def("squares", [](const py::handle& values, const std::vector<std::int64_t>& places, const py::handle& partials,
                        const py::object& stream) {
        const StreamArgument on(stream);
        python_errors([&] { return lf::squares(values.ptr(), places, partials.ptr(), on.get()), 0; });
    });
    m.def("norm_of", [](const py::handle& partials, double scale, const py::object& stream, const py::handle& norm,
                        const py::handle& factor) {
        StreamArgument on(stream);
        on.context.norm = norm.ptr();
        on.context.factor = factor.ptr();
        return python_errors([&] { return lf::norm_of(partials.ptr(), scale, on.get()); });
    });
    m.attr("square_chunk") = lf::kSquareChunk;
    m.attr("code_block") = lf::kCodeBlock;
    m.def("gradient_norm", [](const py::handle& param_groups, double grad_scale, double max_norm, double clip_value,
                              bool rewrite, const py::object& cuda) {
        const lf::Clipping clipping{grad_scale, max_norm, clip_value};
        const CudaArgument context(cuda);
        return python_errors(
            [&] { return result_object(lf::gradient_norm(param_groups.ptr(), clipping, rewrite, context.get())); });
    });
    m.def("hand_over_gradients", [](const py::handle& param_groups, bool rewrite, int cuda_device, std::int64_t chunk,
                                    const py::handle& launch) {
        const Place place(cuda_device);
        return python_errors([&] {
            return result_object(
                lf::hand_over_gradients(param_groups.ptr(), rewrite, {launch.ptr(), chunk}, place.get()));
        });
    });
    m.def("release_gradients", [](const py::handle& param_groups) {
        python_errors([&] {
            lf::release_gradients(param_groups.ptr());
            return 0;
        });
    });
}
