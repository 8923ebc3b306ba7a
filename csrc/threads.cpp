#include "threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace lit_fast {
namespace {

// The entry that GCC compiles `#pragma omp parallel` to; LLVM's and Intel's runtimes export it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel gomp_parallel = nullptr;
std::string gomp_path;  // NOLINT: process lifetime
std::atomic<bool> after_fork{false};

void on_fork_child() { after_fork.store(true, std::memory_order_relaxed); }

const int fork_handler = pthread_atfork(nullptr, nullptr, on_fork_child);

struct Search {
    std::string prefix;
    std::vector<std::string> found;  // paths, preferred first
};

int visit_library(dl_phdr_info* info, std::size_t, void* argument) {
    auto* search = static_cast<Search*>(argument);
    const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
    const std::string name = path.substr(path.rfind('/') + 1);
    for (const char* stem : {"libgomp", "libiomp5", "libomp"}) {
        if (name.rfind(stem, 0) != 0) continue;
        const bool preferred = !search->prefix.empty() && path.rfind(search->prefix, 0) == 0;
        search->found.insert(preferred ? search->found.begin() : search->found.end(), path);
        break;
    }
    return 0;
}

// Workers wait on a condition variable and never spin.
class Pool {
  public:
    void run(void (*work)(void*), void* argument, int threads) {
        const std::lock_guard<std::mutex> one_caller(caller_);
        while (static_cast<int>(workers_.size()) < threads - 1) {
            const auto index = static_cast<int>(workers_.size());
            workers_.emplace_back([this, index] { serve(index); });
            workers_.back().detach();
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = work;
            argument_ = argument;
            helpers_ = threads - 1;
            running_ = helpers_;
            ++generation_;
        }
        start_.notify_all();
        work(argument);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

  private:
    void serve(int index) {
        unsigned long seen = 0;
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= helpers_) continue;
            lock.unlock();
            work_(argument_);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex caller_, mutex_;
    std::condition_variable start_, done_;
    std::vector<std::thread> workers_;
    void (*work_)(void*) = nullptr;
    void* argument_ = nullptr;
    int helpers_ = 0, running_ = 0;
    unsigned long generation_ = 0;
};

}  // namespace

void find_openmp(const std::string& preferred_prefix) {
    Search search{preferred_prefix, {}};
    dl_iterate_phdr(visit_library, &search);
    for (const std::string& path : search.found) {
        void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
        if (library == nullptr) continue;
        if (void* symbol = dlsym(library, "GOMP_parallel")) {
            gomp_parallel = reinterpret_cast<GompParallel>(symbol);
            gomp_path = path;
            return;
        }
        dlclose(library);
    }
}

void parallel(void (*work)(void*), void* argument, int threads) {
    if (threads <= 1 || forked()) {
        work(argument);
    } else if (gomp_parallel != nullptr) {
        gomp_parallel(work, argument, static_cast<unsigned>(threads), 0);
    } else {
        static auto* pool = new Pool;  // never destroyed: its threads may outlive static destructors
        pool->run(work, argument, threads);
    }
}

bool forked() { return after_fork.load(std::memory_order_relaxed) || fork_handler != 0; }

std::string threading_description() {
    if (forked()) return "one thread: this process was forked, and OpenMP threads do not survive a fork";
    if (gomp_parallel != nullptr) return "openmp: " + gomp_path;
    return "own pool: no OpenMP runtime is loaded in this process";
}

}  // namespace lit_fast
