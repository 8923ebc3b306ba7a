#include "timed.h"

#include <structmember.h>

#include <vector>

namespace lit_fast {

namespace {

struct Timed {
    PyObject_HEAD vectorcallfunc vectorcall;  // what a call needs comes first
    PyObject* wrapped;
    PhaseClock* clock;
    int slot;
    bool entered, steps;
    PyObject *owner, *first;
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
