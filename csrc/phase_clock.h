// A clock of a run: whose time it is now, how that is spread over steps, which steps were slow. Knows no pybind11.
//
// Time belongs to the innermost of the calls that are timed (a checkpoint written inside a hook is no time of the
// hook's), so that the slots add up to the time between `start` and `stop` to the nanosecond. A slot is a phase, or a
// named part of one. Everything that grows with steps has its memory from the beginning.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace lit_fast {

using Nanoseconds = std::int64_t;

// The grid of lit_fast/profiler/record.py: below 32 ns every nanosecond, above it 16 buckets to each power of two.
constexpr int kSubbuckets = 16;
constexpr int kBuckets = kSubbuckets * 58 + 2 * kSubbuckets;  // up to 2^63 - 1 ns
int bucket_of(Nanoseconds duration);

struct Histogram {
    std::int64_t count = 0;
    Nanoseconds total = 0, minimum = 0, maximum = 0;
    std::vector<std::int64_t> buckets = std::vector<std::int64_t>(kBuckets);

    void add(Nanoseconds duration);
};

struct ClockSlot {
    int phase;
    Nanoseconds total = 0;
    std::int64_t calls = 0;
    Nanoseconds longest = 0;  // call, without what other slots claimed of it
};

struct SlowStep {
    std::int64_t step = 0;
    Nanoseconds duration = 0, begin = 0;  // begin: since the run's
    std::vector<Nanoseconds> phases, interruptions;
    int longest_slot = -1;  // the named part whose call took longest, and how long
    Nanoseconds longest = 0;
};

struct TimedSpan {
    int slot;
    std::int64_t step;  // -1 outside of any
    Nanoseconds begin, duration;
};

class PhaseClock {
  public:
    // The last phase is what no other one claims. `interruptions`: kinds of things that stop a step inside a phase.
    PhaseClock(int phases, int interruptions, int slowest_kept, int spans_kept);

    int add_part(int phase);  // its slot
    bool has_slot(int slot) const { return 0 <= slot && slot < static_cast<int>(slots_.size()); }

    // On this thread, the only one that is timed, forgetting what was recorded; time belongs to `slot` at first.
    void start(int slot);
    void stop();
    bool times_this_thread() const;

    // A call that is timed, between `enter` and `leave`.
    struct Frame {
        int slot, outer;
        std::int64_t run;
        Nanoseconds begin, before;
    };
    Frame enter(int slot);
    void leave(const Frame& frame);
    // The first call of a step, which ends the one before.
    Frame enter_step(int slot);
    void forget_step(const Frame& frame);  // there was no batch for it
    void end_step();
    void interrupted(int kind, Nanoseconds duration);
    // All time until `resume` is `slot`'s: no call is timed, no step begins; one that goes on ends here.
    void pause(int slot);
    void resume();

    // What was recorded, up to now.
    void settle();
    Nanoseconds wall() const { return since_ - began_; }
    Nanoseconds began() const { return began_; }  // by the steady clock
    std::int64_t steps_begun() const { return step_ + 1; }
    int phases() const { return static_cast<int>(per_step_.size()); }
    const std::vector<ClockSlot>& slots() const { return slots_; }
    const Histogram& steps() const { return steps_; }
    const std::vector<Histogram>& per_step() const { return per_step_; }
    const std::vector<Nanoseconds>& interruptions() const { return interruptions_; }
    std::vector<SlowStep> slowest() const;  // the slowest first
    std::vector<TimedSpan> spans() const;   // in the order in which they ended

  private:
    void credit(Nanoseconds now);
    void close_step(Nanoseconds now);

    std::vector<ClockSlot> slots_;
    Histogram steps_;
    std::vector<Histogram> per_step_;
    std::vector<Nanoseconds> interruptions_, step_phases_, step_interruptions_;
    std::vector<SlowStep> slowest_;
    std::vector<TimedSpan> spans_;
    std::size_t slow_kept_ = 0;
    std::uint64_t spans_seen_ = 0;
    unsigned long thread_ = 0;
    bool running_ = false, in_step_ = false, paused_ = false;
    int rest_, current_, before_pause_ = 0;
    std::int64_t run_ = 0, step_ = -1;
    Nanoseconds began_ = 0, since_ = 0, step_began_ = 0, step_longest_ = 0;
    int step_longest_slot_ = -1;
};

// A new reference to a callable that runs `function`, timed by `clock`, which `owner` keeps alive.
PyObject* timed_call(PyObject* owner, PhaseClock* clock, int slot, PyObject* function);
// ... to an iterator over the same items, the wait for each timed; with `steps` it begins a step. `first` (or None) is
// shown the first item.
PyObject* timed_items(PyObject* owner, PhaseClock* clock, int slot, PyObject* iterator, bool steps, PyObject* first);
// ... to a context manager for a `with` block.
PyObject* timed_block(PyObject* owner, PhaseClock* clock, int slot);

}  // namespace lit_fast
