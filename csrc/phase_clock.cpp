#include "phase_clock.h"

#include <structmember.h>

#include <algorithm>
#include <chrono>

#include "check.h"

namespace lit_fast {

namespace {

Nanoseconds now() {
    using std::chrono::duration_cast;
    return duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int bit_length(std::uint64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(value); }

}  // namespace

int bucket_of(Nanoseconds duration) {
    const auto value = static_cast<std::uint64_t>(std::max<Nanoseconds>(duration, 0));
    const int exponent = std::max(bit_length(value) - bit_length(kSubbuckets), 0);
    return kSubbuckets * exponent + static_cast<int>(value >> exponent);
}

void Histogram::add(Nanoseconds duration) {
    minimum = count == 0 ? duration : std::min(minimum, duration);
    maximum = std::max(maximum, duration);
    ++count;
    total += duration;
    ++buckets[static_cast<std::size_t>(bucket_of(duration))];
}

PhaseClock::PhaseClock(int phases, int interruptions, int slowest_kept, int spans_kept)
    : per_step_(static_cast<std::size_t>(phases)),
      interruptions_(static_cast<std::size_t>(interruptions)),
      step_phases_(static_cast<std::size_t>(phases)),
      step_interruptions_(static_cast<std::size_t>(interruptions)),
      slowest_(static_cast<std::size_t>(slowest_kept)),
      spans_(static_cast<std::size_t>(spans_kept)),
      rest_(phases - 1),
      current_(phases - 1) {
    slots_.reserve(256);
    for (int phase = 0; phase < phases; ++phase) slots_.push_back({phase});
    for (SlowStep& slow : slowest_) {
        slow.phases.resize(step_phases_.size());
        slow.interruptions.resize(interruptions_.size());
    }
}

int PhaseClock::add_part(int phase) {
    slots_.push_back({phase});
    return static_cast<int>(slots_.size()) - 1;
}

bool PhaseClock::times_this_thread() const { return running_ && !paused_ && thread_ == PyThread_get_thread_ident(); }

void PhaseClock::start(int slot) {
    for (ClockSlot& each : slots_) each = {each.phase};
    steps_ = {};
    for (Histogram& histogram : per_step_) histogram = {};
    std::fill(interruptions_.begin(), interruptions_.end(), 0);
    slow_kept_ = 0;
    spans_seen_ = 0;
    thread_ = PyThread_get_thread_ident();
    running_ = true;
    in_step_ = paused_ = false;
    current_ = slot;
    ++slots_[static_cast<std::size_t>(slot)].calls;
    ++run_;  // calls that were entered before are of another run
    step_ = -1;
    began_ = since_ = now();
}

void PhaseClock::stop() {
    if (!running_) return;
    const Nanoseconds end = now();
    credit(end);
    if (in_step_) close_step(end);
    in_step_ = running_ = false;
}

void PhaseClock::credit(Nanoseconds now) {
    const Nanoseconds passed = now - since_;
    ClockSlot& slot = slots_[static_cast<std::size_t>(current_)];
    slot.total += passed;
    step_phases_[static_cast<std::size_t>(slot.phase)] += passed;
    since_ = now;
}

PhaseClock::Frame PhaseClock::enter(int slot) {
    const Nanoseconds begin = now();
    credit(begin);
    ClockSlot& entered = slots_[static_cast<std::size_t>(slot)];
    ++entered.calls;
    const Frame frame{slot, current_, run_, begin, entered.total};
    current_ = slot;
    return frame;
}

void PhaseClock::leave(const Frame& frame) {
    if (frame.run != run_ || !running_) return;
    const Nanoseconds end = now();
    credit(end);
    ClockSlot& left = slots_[static_cast<std::size_t>(frame.slot)];
    const Nanoseconds own = left.total - frame.before;
    left.longest = std::max(left.longest, own);
    if (frame.slot > rest_ && own > step_longest_) {
        step_longest_ = own;
        step_longest_slot_ = frame.slot;
    }
    spans_[spans_seen_++ % spans_.size()] = {frame.slot, in_step_ ? step_ : -1, frame.begin, end - frame.begin};
    current_ = frame.outer;
}

PhaseClock::Frame PhaseClock::enter_step(int slot) {
    const Frame frame = enter(slot);
    if (in_step_) close_step(frame.begin);
    in_step_ = true;
    ++step_;
    step_began_ = frame.begin;
    std::fill(step_phases_.begin(), step_phases_.end(), 0);
    std::fill(step_interruptions_.begin(), step_interruptions_.end(), 0);
    step_longest_ = 0;
    step_longest_slot_ = -1;
    return frame;
}

void PhaseClock::forget_step(const Frame& frame) {
    if (!in_step_ || frame.run != run_) return;
    in_step_ = false;
    --step_;
}

void PhaseClock::end_step() {
    if (!in_step_ || !times_this_thread()) return;
    const Nanoseconds end = now();
    credit(end);
    close_step(end);
    in_step_ = false;
}

void PhaseClock::pause(int slot) {
    if (!times_this_thread()) return;
    end_step();
    credit(now());
    before_pause_ = current_;
    current_ = slot;
    ++slots_[static_cast<std::size_t>(slot)].calls;
    paused_ = true;
}

void PhaseClock::resume() {
    if (!paused_ || !running_) return;
    credit(now());
    current_ = before_pause_;
    paused_ = false;
}

void PhaseClock::close_step(Nanoseconds end) {
    const Nanoseconds duration = end - step_began_;
    steps_.add(duration);
    for (std::size_t phase = 0; phase < step_phases_.size(); ++phase) {
        if (step_phases_[phase] > 0) per_step_[phase].add(step_phases_[phase]);
    }
    SlowStep* place = nullptr;
    if (slow_kept_ < slowest_.size()) {
        place = &slowest_[slow_kept_++];
    } else {
        place = &*std::min_element(slowest_.begin(), slowest_.end(),
                                   [](const SlowStep& a, const SlowStep& b) { return a.duration < b.duration; });
        if (place->duration >= duration) return;
    }
    place->step = step_;
    place->duration = duration;
    place->begin = step_began_ - began_;
    std::copy(step_phases_.begin(), step_phases_.end(), place->phases.begin());
    std::copy(step_interruptions_.begin(), step_interruptions_.end(), place->interruptions.begin());
    place->longest_slot = step_longest_slot_;
    place->longest = step_longest_;
}

void PhaseClock::interrupted(int kind, Nanoseconds duration) {
    interruptions_[static_cast<std::size_t>(kind)] += duration;
    step_interruptions_[static_cast<std::size_t>(kind)] += duration;
}

void PhaseClock::settle() {
    if (running_) credit(now());
}

std::vector<SlowStep> PhaseClock::slowest() const {
    std::vector<SlowStep> found(slowest_.begin(), slowest_.begin() + static_cast<std::ptrdiff_t>(slow_kept_));
    std::sort(found.begin(), found.end(), [](const SlowStep& a, const SlowStep& b) { return a.duration > b.duration; });
    return found;
}

std::vector<TimedSpan> PhaseClock::spans() const {
    std::vector<TimedSpan> found;
    const std::uint64_t kept = std::min<std::uint64_t>(spans_seen_, spans_.size());
    for (std::uint64_t n = spans_seen_ - kept; n < spans_seen_; ++n) found.push_back(spans_[n % spans_.size()]);
    return found;
}

// -- what Python calls: three types of objects, made here because a call through pybind11 takes longer than both
// readings of the clock

namespace {

struct Timed {
    PyObject_HEAD vectorcallfunc vectorcall;
    PyObject *owner, *wrapped, *first;
    PhaseClock* clock;
    int slot;
    bool entered, steps;
    PhaseClock::Frame frame;
};

Timed* as_timed(PyObject* self) { return reinterpret_cast<Timed*>(self); }

int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(as_timed(self)->owner);
    Py_VISIT(as_timed(self)->wrapped);
    Py_VISIT(as_timed(self)->first);
    return 0;
}

// `owner` stays: the clock must outlive whoever still calls.
int clear(PyObject* self) {
    Py_CLEAR(as_timed(self)->wrapped);
    Py_CLEAR(as_timed(self)->first);
    return 0;
}

void dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    Py_CLEAR(as_timed(self)->owner);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject* gone() {
    PyErr_SetString(PyExc_RuntimeError, "this timed callable was cleared");
    return nullptr;
}

PyObject* call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
    Timed* timed = as_timed(self);
    if (timed->wrapped == nullptr) return gone();
    PhaseClock& clock = *timed->clock;
    if (!clock.times_this_thread()) return PyObject_Vectorcall(timed->wrapped, args, nargsf, names);
    const PhaseClock::Frame frame = clock.enter(timed->slot);
    PyObject* result = PyObject_Vectorcall(timed->wrapped, args, nargsf, names);
    clock.leave(frame);
    return result;
}

// Whatever the wrapped function has: its name, its signature.
PyObject* attribute(PyObject* self, PyObject* name) {
    PyObject* own = PyObject_GenericGetAttr(self, name);
    if (own != nullptr || as_timed(self)->wrapped == nullptr || !PyErr_ExceptionMatches(PyExc_AttributeError))
        return own;
    PyErr_Clear();
    return PyObject_GetAttr(as_timed(self)->wrapped, name);
}

PyObject* description(PyObject* self) { return PyUnicode_FromFormat("<timed %R>", as_timed(self)->wrapped); }

PyObject* next(PyObject* self) {
    Timed* timed = as_timed(self);
    if (timed->wrapped == nullptr) return gone();
    PhaseClock& clock = *timed->clock;
    if (!clock.times_this_thread()) return Py_TYPE(timed->wrapped)->tp_iternext(timed->wrapped);
    const PhaseClock::Frame frame = timed->steps ? clock.enter_step(timed->slot) : clock.enter(timed->slot);
    PyObject* item = Py_TYPE(timed->wrapped)->tp_iternext(timed->wrapped);
    if (item != nullptr && timed->first != nullptr) {
        PyObject* show = timed->first;
        timed->first = nullptr;
        PyObject* shown = PyObject_CallOneArg(show, item);
        Py_DECREF(show);
        if (shown == nullptr) Py_CLEAR(item);
        Py_XDECREF(shown);
    }
    if (item == nullptr && timed->steps) clock.forget_step(frame);
    clock.leave(frame);
    return item;
}

PyObject* begin_block(PyObject* self, PyObject*) {
    Timed* timed = as_timed(self);
    timed->entered = timed->clock->times_this_thread();
    if (timed->entered) timed->frame = timed->clock->enter(timed->slot);
    Py_RETURN_NONE;
}

PyObject* end_block(PyObject* self, PyObject*) {
    Timed* timed = as_timed(self);
    if (timed->entered) timed->clock->leave(timed->frame);
    timed->entered = false;
    Py_RETURN_NONE;
}

PyMemberDef call_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Timed, vectorcall), READONLY, nullptr},
    {"__wrapped__", T_OBJECT, offsetof(Timed, wrapped), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyMethodDef block_methods[] = {
    {"__enter__", begin_block, METH_NOARGS, nullptr},
    {"__exit__", end_block, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

template <class Function>
void* address(Function* function) {
    return reinterpret_cast<void*>(function);
}

constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC;

PyObject* made(const char* name, unsigned flags, std::vector<PyType_Slot> slots) {
    slots.insert(slots.end(), {{Py_tp_traverse, address(traverse)},
                               {Py_tp_clear, address(clear)},
                               {Py_tp_dealloc, address(dealloc)},
                               {0, nullptr}});
    PyType_Spec spec{name, static_cast<int>(sizeof(Timed)), 0, flags, slots.data()};
    return PyType_FromSpec(&spec);
}

PyObject* call_type() {
    static PyObject* type = made("lit_fast._core.TimedCall", kFlags | Py_TPFLAGS_HAVE_VECTORCALL,
                                 {{Py_tp_call, address(PyVectorcall_Call)},
                                  {Py_tp_getattro, address(attribute)},
                                  {Py_tp_repr, address(description)},
                                  {Py_tp_members, call_members}});
    return type;
}

PyObject* items_type() {
    static PyObject* type = made("lit_fast._core.TimedItems", kFlags,
                                 {{Py_tp_iter, address(PyObject_SelfIter)}, {Py_tp_iternext, address(next)}});
    return type;
}

PyObject* block_type() {
    static PyObject* type = made("lit_fast._core.TimedBlock", kFlags, {{Py_tp_methods, block_methods}});
    return type;
}

PyObject* of_type(PyObject* type, PyObject* owner, PhaseClock* clock, int slot, PyObject* wrapped, PyObject* first) {
    if (type == nullptr) return nullptr;
    PyObject* object = PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type), 0);
    if (object == nullptr) return nullptr;
    Timed* timed = as_timed(object);
    timed->vectorcall = call;
    Py_INCREF(owner);
    timed->owner = owner;
    Py_XINCREF(wrapped);
    timed->wrapped = wrapped;
    Py_XINCREF(first);
    timed->first = first;
    timed->clock = clock;
    timed->slot = slot;
    timed->entered = timed->steps = false;
    return object;
}

}  // namespace

PyObject* timed_call(PyObject* owner, PhaseClock* clock, int slot, PyObject* function) {
    return of_type(call_type(), owner, clock, slot, function, nullptr);
}

PyObject* timed_items(PyObject* owner, PhaseClock* clock, int slot, PyObject* iterator, bool steps, PyObject* first) {
    PyObject* object = of_type(items_type(), owner, clock, slot, iterator, first == Py_None ? nullptr : first);
    if (object != nullptr) as_timed(object)->steps = steps;
    return object;
}

PyObject* timed_block(PyObject* owner, PhaseClock* clock, int slot) {
    return of_type(block_type(), owner, clock, slot, nullptr, nullptr);
}

}  // namespace lit_fast
