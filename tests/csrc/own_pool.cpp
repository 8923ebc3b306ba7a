// csrc/threads.cpp in a process without OpenMP: every thread takes part, results are whole, and a forked child works
// on one thread instead of waiting for workers that it does not have.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <set>
#include <thread>

#include "threads.h"

namespace {

struct Shared {
    std::atomic<int> next{0};
    std::atomic<int> done{0};
    std::mutex mutex;
    std::set<std::thread::id> threads;
};

void work(void* argument) {
    auto* shared = static_cast<Shared*>(argument);
    while (shared->next.fetch_add(1) < 200) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        shared->done.fetch_add(1);
        const std::lock_guard<std::mutex> lock(shared->mutex);
        shared->threads.insert(std::this_thread::get_id());
    }
}

bool run(int threads, std::size_t expected) {
    Shared shared;
    lit_fast::parallel(work, &shared, threads);
    std::printf("%d threads: %zu took part, %d done\n", threads, shared.threads.size(), shared.done.load());
    return shared.done == 200 && shared.threads.size() == expected;
}

}  // namespace

int main() {
    lit_fast::find_openmp("");
    std::printf("%s\n", lit_fast::threading_description().c_str());
    bool ok = lit_fast::threading_description().rfind("own pool", 0) == 0;
    for (int repeat = 0; repeat < 3; ++repeat) ok = run(3, 3) && run(1, 1) && run(2, 2) && ok;
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) _exit(run(3, 1) ? 0 : 1);
    int status = 1;
    waitpid(child, &status, 0);
    return ok && status == 0 ? 0 : 1;
}
