// Tensors cut into chunks, which threads share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace lit_fast {

// Work of every thread: chunks are handed out by a counter, so a thread that the machine slows down takes fewer.
// 64 KiB of float32 a chunk: long streams for the prefetchers, thousands of chunks in a model.
constexpr std::int64_t kStepChunk = 1 << 14;

struct Chunk {
    std::int32_t tensor;
    std::int64_t begin, end;
};

template <class Numel>
std::vector<Chunk> cut(std::size_t tensors, std::int64_t size, Numel numel) {
    std::vector<Chunk> chunks;
    for (std::size_t t = 0; t < tensors; ++t) {
        const std::int64_t n = numel(t);
        for (std::int64_t begin = 0; begin < n; begin += size) {
            chunks.push_back({static_cast<std::int32_t>(t), begin, begin + size < n ? begin + size : n});
        }
    }
    return chunks;
}

// Calls body(chunk index) for every chunk, on up to `threads` threads.
template <class Body>
void for_each_chunk(std::size_t count, int threads, const Body& body) {
    struct Shared {
        const Body& body;
        std::size_t count;
        std::atomic<std::size_t> next{0};
    } shared{body, count};
    const auto work = [](void* argument) {
        auto* s = static_cast<Shared*>(argument);
        for (;;) {
            const std::size_t i = s->next.fetch_add(1, std::memory_order_relaxed);
            if (i >= s->count) return;
            s->body(i);
        }
    };
    const auto useful = static_cast<int>(count < 64 ? count : 64 * 64);
    parallel(work, &shared, threads < useful ? threads : useful);
}

}  // namespace lit_fast
