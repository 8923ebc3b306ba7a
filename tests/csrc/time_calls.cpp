// csrc/phase_clock.cpp: a thread whose calls are timed, and others that read meanwhile. Whatever they see adds up.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "phase_clock.h"

namespace {

using lit_fast::ClockRecord;
using lit_fast::Nanoseconds;
using lit_fast::PhaseClock;

constexpr int kPhases = 4, kSteps = 3000;

void check(bool holds, const char* what) {
    if (holds) return;
    std::printf("not so: %s\n", what);
    std::exit(1);
}

Nanoseconds steady() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

void adds_up(const ClockRecord& record) {
    Nanoseconds in_steps = 0;
    for (const lit_fast::Histogram& phase : record.per_step) in_steps += phase.total;
    check(in_steps == record.steps.total, "the phases of steps add up to the steps");
    check(record.steps.total <= record.wall(), "steps are part of the wall time");
    check(record.steps.count <= record.step + 1, "no more steps than have begun");
    for (const lit_fast::SlowStep& slow : record.slowest) {
        check(std::accumulate(slow.phases.begin(), slow.phases.end(), Nanoseconds{0}) == slow.duration,
              "the phases of a step add up to it");
    }
}

void down(PhaseClock& clock, int levels) {
    const PhaseClock::Frame frame = clock.enter(levels % (kPhases + 2));
    if (levels > 0) down(clock, levels - 1);
    clock.leave(frame);
}

// Steps of some calls each, few of them with more than the clock notes before it works out what they come to.
void run(PhaseClock& clock) {
    for (int step = 0; step < kSteps; ++step) {
        clock.leave(clock.enter_step(0));
        down(clock, step % 500 == 7 ? 2000 : step % 13);
        if (step % 10 == 3) clock.interrupted(0, 5);
        if (step % 700 == 11) {
            const PhaseClock::Frame around = clock.enter(1);
            clock.pause(2);
            check(!clock.times_this_thread(), "nothing is timed while it is paused");
            clock.leave(around);
            clock.resume();
        }
        if (step % 900 == 5) clock.end_step();
    }
    const PhaseClock::Frame first = clock.enter(0), second = clock.enter(1);
    clock.leave(first);
    clock.leave(second);  // of a call that ended with the one around it
    const PhaseClock::Frame empty = clock.enter_step(0);
    clock.forget_step(empty);
    clock.leave(empty);
}

void from_another_thread(PhaseClock& clock, const std::atomic<bool>& ended) {
    Nanoseconds before = 0;
    while (!ended) {
        check(!clock.times_this_thread(), "one thread is timed");
        const ClockRecord record = clock.read();
        adds_up(record);
        check(record.wall() >= before, "time goes on");
        before = record.wall();
        check(clock.spans(20).size() <= 512, "so many spans are kept");
        clock.add_part(0);
    }
}

}  // namespace

int main() {
    PhaseClock clock(kPhases, 1, 10, 512);
    for (int part = 0; part < 2; ++part) clock.add_part(part);
    for (int repeat = 0; repeat < 3; ++repeat) {
        const Nanoseconds began = steady();
        clock.start(kPhases - 1);
        std::atomic<bool> ended{false};
        std::thread readers[2];
        for (std::thread& reader : readers) {
            reader = std::thread(from_another_thread, std::ref(clock), std::cref(ended));
        }
        run(clock);
        ended = true;
        for (std::thread& reader : readers) reader.join();
        clock.stop();
        const Nanoseconds took = steady() - began;
        const ClockRecord record = clock.read();
        adds_up(record);
        check(record.step + 1 == kSteps && record.steps.count == kSteps, "every step is counted, the forgotten is not");
        check(record.interruptions[0] == 5 * kSteps / 10, "interruptions are counted");
        check(record.wall() <= took && record.wall() >= took - took / 100 - 20'000'000,
              "as long as by the system's clock");
        check(clock.read().wall() == record.wall(), "after the end it stands still");
    }
    std::printf("all of it adds up\n");
}
