// A clock of a run: whose time it is now, how that is spread over steps, which steps were slow. Knows no Python.
//
// Time belongs to the innermost of the calls that are timed (a checkpoint written inside a hook is no time of the
// hook's), so that the slots add up to the time between `start` and `stop` to the nanosecond. A slot is a phase, or a
// named part of one. Everything that grows with steps has its memory from the beginning.
//
// The thread that is timed only notes what happened when: 16 bytes for each call that begins or ends, in a ring, in
// memory that it touches in order. What follows of it (sums, histograms, the slowest steps) is worked out some dozen
// steps at a time, by whoever holds the mutex, while the code and the tables for it are in the cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
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

// What a clock has recorded.
struct ClockRecord {
    std::vector<ClockSlot> slots;
    Histogram steps;
    std::vector<Histogram> per_step;  // by phase
    std::vector<Nanoseconds> interruptions;
    std::vector<SlowStep> slowest;
    std::int64_t step = -1;  // the last one that began

    Nanoseconds wall() const;
};

// The processor's counter of time, where the system itself reads its clock from that; its steady clock elsewhere.
class Ticks {
  public:
    // Learns how fast the counter runs, since the extension was loaded or the machine woke up; this may take 10 ms.
    void start();
    std::uint64_t now() const {
#if defined(__x86_64__) && defined(__linux__)
        if (counter_) return __builtin_ia32_rdtsc();
#endif
        return steady();
    }
    Nanoseconds since_start(std::uint64_t ticks) const {
        const auto passed = static_cast<std::int64_t>(ticks - began_);
        return static_cast<Nanoseconds>((static_cast<__int128>(passed) * rate_) >> kShift);
    }

  private:
    static constexpr int kShift = 40;
    static std::uint64_t steady();  // ns

    bool counter_ = false;
    std::uint64_t began_ = 0;
    std::int64_t rate_ = std::int64_t{1} << kShift;  // ns a tick, times 2^kShift
};

// A number that no two threads of a process share.
inline std::uintptr_t this_thread() {
    std::uintptr_t thread;
#if defined(__x86_64__) && defined(__linux__)
    __asm__("mov %%fs:0, %0" : "=r"(thread));  // what pthread_self() reads, without a call
#else
    static thread_local char own;
    thread = reinterpret_cast<std::uintptr_t>(&own);
#endif
    return thread;
}

class PhaseClock {
  public:
    // The last phase is what no other one claims. `interruptions`: kinds of things that stop a step inside a phase.
    PhaseClock(int phases, int interruptions, int slowest_kept, int spans_kept);

    int add_part(int phase);  // its slot
    bool has_slot(int slot) const;

    // On this thread, the only one that is timed, forgetting what was recorded; time belongs to `slot` at first.
    void start(int slot);
    void stop();
    // In a process that was forked off while it ran: there nothing is timed.
    void begin_child();
    bool times_this_thread() const { return thread_.load(std::memory_order_relaxed) == this_thread(); }

    // A call that is timed, between `enter` and `leave`: on the thread that is timed, as all until `resume`.
    struct Frame {
        std::uint32_t run, depth;
    };
    Frame enter(int slot) { return enter(kEnter, slot); }
    // The first call of a step, which ends the one before.
    Frame enter_step(int slot) { return enter(kEnterStep, slot); }
    void leave(Frame frame) {
        if (frame.run != run_.load(std::memory_order_relaxed) || frame.depth >= depth_) return;
        note(ticks_.now(), kLeave, static_cast<int>(frame.depth));
        depth_ = frame.depth;
    }
    void forget_step(Frame frame) {  // there was no batch for it
        if (frame.run == run_.load(std::memory_order_relaxed)) note(ticks_.now(), kForgetStep, 0);
    }
    void interrupted(int kind, Nanoseconds duration) { note(static_cast<std::uint64_t>(duration), kInterrupted, kind); }
    void end_step();
    // All time until `resume` is `slot`'s: no call is timed, no step begins; one that goes on ends here.
    void pause(int slot);
    void resume();

    // What was recorded, up to now; from any thread.
    ClockRecord read();
    std::vector<TimedSpan> spans(std::int64_t steps);  // of the last steps, in the order in which they ended

  private:
    enum Kind : std::uint32_t { kEnter, kEnterStep, kLeave, kForgetStep, kInterrupted, kEndStep };
    struct Event {
        std::uint64_t ticks;  // of kInterrupted: its duration in ns
        Kind kind;
        int of;  // a slot, a depth, a kind of interruption
    };
    struct Open {  // a call that goes on
        int slot;
        Nanoseconds begin, before;
    };
    static constexpr std::size_t kRoom = 1024;  // events; a step has some 12 to 40
    static constexpr std::size_t kOften = 512, kAgain = 64;

    Frame enter(Kind kind, int slot) {
        note(ticks_.now(), kind, slot);
        return {run_.load(std::memory_order_relaxed), depth_++};
    }
    void note(std::uint64_t ticks, Kind kind, int of) {
        const std::size_t number = noted_.load(std::memory_order_relaxed);
        if (number == make_room_at_) make_room();
        events_[number % kRoom] = {ticks, kind, of};
        noted_.store(number + 1, std::memory_order_release);
    }
    void make_room();
    // With the mutex held:
    void work_out();
    void work_out(const Event& event);
    int current() const;
    void credit(Nanoseconds now);
    void begin_call(int slot, Nanoseconds now);
    void end_call(std::size_t depth, Nanoseconds now);
    void close_step(Nanoseconds end);

    // What a call needs, in one line of the cache; but for `thread_` and `noted_` the timed thread's own.
    alignas(64) std::atomic<std::uintptr_t> thread_{0};  // 0: nobody is timed
    std::atomic<std::uint32_t> run_{0};                  // calls that were entered before `start` are of another run
    std::uint32_t depth_ = 0;
    std::atomic<std::size_t> noted_{0};
    std::size_t make_room_at_ = kOften;
    std::vector<Event> events_;
    Ticks ticks_;
    std::size_t full_at_ = kRoom;

    mutable std::mutex mutex_;  // of what follows
    std::size_t worked_out_ = 0;
    bool running_ = false, paused_ = false, in_step_ = false;
    std::uintptr_t paused_thread_ = 0;
    int rest_, base_, pause_slot_ = 0;
    ClockRecord record_;
    std::vector<Open> open_;
    std::vector<Nanoseconds> step_phases_, step_interruptions_;
    std::size_t slowest_kept_;
    std::vector<TimedSpan> spans_;
    std::uint64_t spans_seen_ = 0;
    Nanoseconds since_ = 0, step_began_ = 0, step_longest_ = 0;
    int step_longest_slot_ = -1;
};

}  // namespace lit_fast
