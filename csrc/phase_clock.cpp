#include "phase_clock.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <new>
#include <string>

namespace lit_fast {

namespace {

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

Nanoseconds ClockRecord::wall() const {
    Nanoseconds all = 0;
    for (const ClockSlot& slot : slots) all += slot.total;
    return all;
}

// -- ticks

namespace {

Nanoseconds steady_now() {
    using std::chrono::duration_cast;
    return duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

#if defined(__x86_64__) && defined(__linux__)
// The counter and the steady clock at the same moment, to some 20 ns: the closest of a few tries.
struct Moment {
    std::uint64_t counter;
    Nanoseconds steady;

    static Moment now() {
        Moment closest{0, 0};
        std::uint64_t least = ~std::uint64_t{0};
        for (int n = 0; n < 8; ++n) {
            const std::uint64_t before = __builtin_ia32_rdtsc();
            const Nanoseconds time = steady_now();
            const std::uint64_t width = __builtin_ia32_rdtsc() - before;
            if (width < least) {
                least = width;
                closest = {before + width / 2, time};
            }
        }
        return closest;
    }
};

// Linux takes its time from the counter only where it has found it to run evenly, and alike on all processors.
bool counter_is_trusted() {
    std::ifstream file("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    std::string source;
    return static_cast<bool>(file >> source) && source == "tsc";
}

// How long the machine has slept since it was started: the steady clock stands still then, the counter goes on, or is
// set back.
Nanoseconds slept() {
    const auto now = [](clockid_t clock) {
        timespec time{};
        clock_gettime(clock, &time);
        return Nanoseconds{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
    };
    return now(CLOCK_BOOTTIME) - now(CLOCK_MONOTONIC);
}

struct Reference {
    Moment moment = Moment::now();
    Nanoseconds slept = lit_fast::slept();
};

Reference reference;  // from when the extension was loaded, or the machine last woke up
#endif

}  // namespace

std::uint64_t Ticks::steady() { return static_cast<std::uint64_t>(steady_now()); }

void Ticks::start() {
#if defined(__x86_64__) && defined(__linux__)
    counter_ = counter_is_trusted();
    if (counter_) {
        if (slept() - reference.slept > 1'000'000) reference = {};
        const Moment from = reference.moment;
        Moment moment = Moment::now();
        while (moment.steady - from.steady < 10'000'000) moment = Moment::now();  // for 2e-6 of its rate
        const auto passed = static_cast<double>(moment.counter - from.counter);
        const double rate = static_cast<double>(moment.steady - from.steady) / passed;
        rate_ = static_cast<std::int64_t>(rate * static_cast<double>(std::int64_t{1} << kShift));
    }
#endif
    began_ = now();
}

// -- the clock

PhaseClock::PhaseClock(int phases, int interruptions, int slowest_kept, int spans_kept)
    : events_(kRoom),
      rest_(phases - 1),
      base_(phases - 1),
      step_phases_(static_cast<std::size_t>(phases)),
      step_interruptions_(static_cast<std::size_t>(interruptions)),
      slowest_kept_(static_cast<std::size_t>(slowest_kept)),
      spans_(static_cast<std::size_t>(spans_kept)) {
    for (int phase = 0; phase < phases; ++phase) record_.slots.push_back({phase});
    record_.per_step.resize(step_phases_.size());
    record_.interruptions.resize(step_interruptions_.size());
    record_.slowest.reserve(slowest_kept_);
    open_.reserve(64);
}

int PhaseClock::add_part(int phase) {
    const std::lock_guard<std::mutex> held(mutex_);
    record_.slots.push_back({phase});
    return static_cast<int>(record_.slots.size()) - 1;
}

bool PhaseClock::has_slot(int slot) const {
    const std::lock_guard<std::mutex> held(mutex_);
    return 0 <= slot && slot < static_cast<int>(record_.slots.size());
}

void PhaseClock::start(int slot) {
    const std::lock_guard<std::mutex> held(mutex_);
    worked_out_ = noted_;
    make_room_at_ = worked_out_ + kOften;
    full_at_ = worked_out_ + kRoom;
    for (ClockSlot& each : record_.slots) each = {each.phase};
    record_.steps = {};
    for (Histogram& histogram : record_.per_step) histogram = {};
    std::fill(record_.interruptions.begin(), record_.interruptions.end(), 0);
    record_.slowest.clear();
    record_.step = -1;
    open_.clear();
    spans_seen_ = 0;
    running_ = true;
    in_step_ = paused_ = false;
    base_ = slot;
    ++record_.slots[static_cast<std::size_t>(slot)].calls;
    ++run_;
    depth_ = 0;
    ticks_.start();
    since_ = 0;
    thread_ = this_thread();
}

void PhaseClock::stop() {
    const std::uint64_t now = ticks_.now();
    const std::lock_guard<std::mutex> held(mutex_);
    if (!running_) return;
    work_out();
    work_out({now, kEndStep, 0});
    running_ = false;
    ++run_;
    thread_ = 0;
}

void PhaseClock::begin_child() {
    new (&mutex_) std::mutex;  // a thread that there is no more of may have held it
    running_ = false;
    ++run_;
    thread_ = 0;
}

void PhaseClock::end_step() {
    if (times_this_thread()) note(ticks_.now(), kEndStep, 0);
}

void PhaseClock::pause(int slot) {
    if (!times_this_thread()) return;
    end_step();
    const std::lock_guard<std::mutex> held(mutex_);
    work_out();
    ++record_.slots[static_cast<std::size_t>(slot)].calls;
    pause_slot_ = slot;
    paused_ = true;
    paused_thread_ = thread_.exchange(0);
}

void PhaseClock::resume() {
    const std::uint64_t now = ticks_.now();
    const std::lock_guard<std::mutex> held(mutex_);
    if (!paused_ || !running_) return;
    work_out();
    credit(ticks_.since_start(now));
    paused_ = false;
    thread_ = paused_thread_;
}

ClockRecord PhaseClock::read() {
    const std::lock_guard<std::mutex> held(mutex_);
    work_out();
    ClockRecord record = record_;
    if (running_) {
        const Nanoseconds passed = ticks_.since_start(ticks_.now()) - since_;
        record.slots[static_cast<std::size_t>(current())].total += std::max<Nanoseconds>(passed, 0);
    }
    std::sort(record.slowest.begin(), record.slowest.end(),
              [](const SlowStep& a, const SlowStep& b) { return a.duration > b.duration; });
    return record;
}

std::vector<TimedSpan> PhaseClock::spans(std::int64_t steps) {
    const std::lock_guard<std::mutex> held(mutex_);
    work_out();
    std::vector<TimedSpan> found;
    const std::uint64_t kept = std::min<std::uint64_t>(spans_seen_, spans_.size());
    found.reserve(kept);
    for (std::uint64_t n = spans_seen_ - kept; n < spans_seen_; ++n) {
        const TimedSpan& span = spans_[n % spans_.size()];
        if (span.step >= 0 && span.step > record_.step - steps) found.push_back(span);
    }
    return found;
}

// A thread that reads may have been put to sleep by the system: nobody waits for it while there is room.
void PhaseClock::make_room() {
    const std::size_t noted = noted_.load(std::memory_order_relaxed);
    std::unique_lock<std::mutex> held(mutex_, std::try_to_lock);
    if (!held.owns_lock() && noted < full_at_) {
        make_room_at_ = std::min(noted + kAgain, full_at_);
        return;
    }
    if (!held.owns_lock()) held.lock();
    work_out();
    make_room_at_ = noted + kOften;
    full_at_ = noted + kRoom;
}

// -- what events come to

void PhaseClock::work_out() {
    const std::size_t end = noted_.load(std::memory_order_acquire);
    for (; worked_out_ < end; ++worked_out_) work_out(events_[worked_out_ % kRoom]);
}

void PhaseClock::work_out(const Event& event) {
    const auto of = static_cast<std::size_t>(event.of);
    if (event.kind == kInterrupted) {
        record_.interruptions[of] += static_cast<Nanoseconds>(event.ticks);
        step_interruptions_[of] += static_cast<Nanoseconds>(event.ticks);
        return;
    }
    const Nanoseconds now = ticks_.since_start(event.ticks);
    credit(now);
    switch (event.kind) {
        case kEnterStep:
            if (in_step_) close_step(now);
            in_step_ = true;
            ++record_.step;
            step_began_ = now;
            std::fill(step_phases_.begin(), step_phases_.end(), 0);
            std::fill(step_interruptions_.begin(), step_interruptions_.end(), 0);
            step_longest_ = 0;
            step_longest_slot_ = -1;
            [[fallthrough]];
        case kEnter:
            begin_call(event.of, now);
            break;
        case kLeave:
            end_call(of, now);
            break;
        case kForgetStep:
            if (in_step_) --record_.step;
            in_step_ = false;
            break;
        default:
            if (in_step_) close_step(now);
            in_step_ = false;
    }
}

int PhaseClock::current() const {
    if (paused_) return pause_slot_;
    return open_.empty() ? base_ : open_.back().slot;
}

// A counter that was set back (by a machine that slept) costs the time until now, and nothing later.
void PhaseClock::credit(Nanoseconds now) {
    const Nanoseconds passed = std::max<Nanoseconds>(now - since_, 0);
    ClockSlot& slot = record_.slots[static_cast<std::size_t>(current())];
    slot.total += passed;
    step_phases_[static_cast<std::size_t>(slot.phase)] += passed;
    since_ = now;
}

void PhaseClock::begin_call(int slot, Nanoseconds now) {
    ClockSlot& entered = record_.slots[static_cast<std::size_t>(slot)];
    ++entered.calls;
    open_.push_back({slot, now, entered.total});
}

void PhaseClock::end_call(std::size_t depth, Nanoseconds now) {
    const Open ended = open_[depth];
    open_.resize(depth);
    ClockSlot& left = record_.slots[static_cast<std::size_t>(ended.slot)];
    const Nanoseconds own = left.total - ended.before;
    left.longest = std::max(left.longest, own);
    if (ended.slot > rest_ && own > step_longest_) {
        step_longest_ = own;
        step_longest_slot_ = ended.slot;
    }
    TimedSpan& span = spans_[spans_seen_++ % spans_.size()];
    span = {ended.slot, in_step_ ? record_.step : -1, ended.begin, std::max<Nanoseconds>(now - ended.begin, 0)};
}

void PhaseClock::close_step(Nanoseconds end) {
    const Nanoseconds duration = std::max<Nanoseconds>(end - step_began_, 0);
    record_.steps.add(duration);
    for (std::size_t phase = 0; phase < step_phases_.size(); ++phase) {
        if (step_phases_[phase] > 0) record_.per_step[phase].add(step_phases_[phase]);
    }
    std::vector<SlowStep>& slowest = record_.slowest;
    const auto faster = [](const SlowStep& a, const SlowStep& b) { return a.duration < b.duration; };
    if (slowest.size() < slowest_kept_) {
        slowest.emplace_back();
        slowest.back().duration = -1;
    }
    SlowStep& fastest = *std::min_element(slowest.begin(), slowest.end(), faster);
    if (fastest.duration >= duration) return;
    fastest.step = record_.step;
    fastest.duration = duration;
    fastest.begin = step_began_;
    fastest.phases = step_phases_;
    fastest.interruptions = step_interruptions_;
    fastest.longest_slot = step_longest_slot_;
    fastest.longest = step_longest_;
}

}  // namespace lit_fast
