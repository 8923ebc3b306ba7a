// This machine's memory bandwidth with one mix of reads and writes: what no kernel with that mix can beat.
//
// benchmarks/optimizer.py compiles it once for each mix, with -DSTREAMS='{4,1,0},{4,1,1}' for an array of 4 bytes an
// element that is read beside one that is read and written; calls every pattern; and the fastest one counts.
// Independent of the library on purpose. Integer arithmetic: no value is slower than another.
#include <cstddef>
#include <cstdint>
#include <utility>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

struct Stream {
    int bytes;  // an element
    bool read, written;
};
constexpr Stream kStreams[] = {STREAMS};
constexpr std::size_t kCount = sizeof(kStreams) / sizeof(Stream);
using AllStreams = std::make_index_sequence<kCount>;

typedef long long Vector __attribute__((vector_size(32), may_alias));
constexpr std::int64_t kLine = 64;      // bytes, and elements of a group: a stream of b bytes has b lines in it
constexpr std::int64_t kBlock = 16384;  // elements that a thread takes at once

enum class Stores { plain, past_cache_where_only_written, past_cache };

template <Stream kStream, Stores kStores>
void store(std::uint8_t* to, Vector value) {
#ifdef __AVX__
    if constexpr (kStores == Stores::past_cache || (kStores != Stores::plain && !kStream.read)) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
        return;
    }
#endif
    *reinterpret_cast<Vector*>(to) = value;
}

template <int kAhead>
void ask_for(const std::uint8_t* line) {
    if constexpr (kAhead > 0) __builtin_prefetch(line + kAhead);
}

// ---- group by group: 64 elements of every stream, read and written on the spot ----

template <Stream kStream, int kAhead, Stores kStores>
void pass_group(std::uint8_t* p, Vector& sum) {
    for (int line = 0; line < kStream.bytes; ++line, p += kLine) {
        ask_for<kAhead>(p);
        for (std::int64_t half = 0; half < kLine; half += 32) {
            if constexpr (kStream.read) sum += *reinterpret_cast<const Vector*>(p + half);
            if constexpr (kStream.written) store<kStream, kStores>(p + half, sum);
        }
    }
}

template <int kAhead, Stores kStores>
struct ByGroup {
    template <std::size_t... k>
    static Vector block(std::uint8_t* const* streams, std::int64_t begin, std::index_sequence<k...>) {
        Vector sum = {};
        for (std::int64_t i = begin; i < begin + kBlock; i += kLine) {
            (pass_group<kStreams[k], kAhead, kStores>(streams[k] + i * kStreams[k].bytes, sum), ...);
        }
        return sum;
    }
};

// ---- page by page: a stretch of each stream is read after the other, then each one is written ----

template <Stream kStream, int kAhead>
void read_page(const std::uint8_t* p, std::int64_t elements, Vector& sum) {
    if constexpr (kStream.read) {
        for (const std::uint8_t* end = p + elements * kStream.bytes; p < end; p += kLine) {
            ask_for<kAhead>(p);
            sum += *reinterpret_cast<const Vector*>(p) + *reinterpret_cast<const Vector*>(p + 32);
        }
    }
}

template <Stream kStream, Stores kStores>
void write_page(std::uint8_t* p, std::int64_t elements, Vector sum) {
    if constexpr (kStream.written) {
        for (std::uint8_t* end = p + elements * kStream.bytes; p < end; p += 32) store<kStream, kStores>(p, sum);
    }
}

template <int kElements, int kAhead, Stores kStores>
struct ByPage {
    template <std::size_t... k>
    static Vector block(std::uint8_t* const* streams, std::int64_t begin, std::index_sequence<k...>) {
        Vector sum = {};
        for (std::int64_t i = begin; i < begin + kBlock; i += kElements) {
            (read_page<kStreams[k], kAhead>(streams[k] + i * kStreams[k].bytes, kElements, sum), ...);
            (write_page<kStreams[k], kStores>(streams[k] + i * kStreams[k].bytes, kElements, sum), ...);
        }
        return sum;
    }
};

// ---- the threads ----

// Blocks as threads become free: they walk side by side through memory.
template <class Pattern>
long long side_by_side(std::uint8_t* const* streams, std::int64_t n) {
    long long kept = 0;  // so that no read can be left out
#pragma omp parallel for schedule(dynamic) reduction(+ : kept)
    for (std::int64_t block = 0; block < n / kBlock; ++block) {
        const Vector sum = Pattern::block(streams, block * kBlock, AllStreams());
        kept += sum[0] + sum[1] + sum[2] + sum[3];
    }
    return kept;
}

// Each thread has a stretch of its own, as long as the others'.
template <class Pattern>
long long apart(std::uint8_t* const* streams, std::int64_t n) {
    long long kept = 0;
#pragma omp parallel for schedule(static) reduction(+ : kept)
    for (std::int64_t block = 0; block < n / kBlock; ++block) {
        const Vector sum = Pattern::block(streams, block * kBlock, AllStreams());
        kept += sum[0] + sum[1] + sum[2] + sum[3];
    }
    return kept;
}

}  // namespace

// streams: one pointer each, at multiples of 64 bytes. n: elements, a multiple of kBlock.
#define PATTERN(name, threads, ...) \
    extern "C" long long name(std::uint8_t* const* streams, std::int64_t n) { return threads<__VA_ARGS__>(streams, n); }

PATTERN(group, side_by_side, ByGroup<0, Stores::plain>)
PATTERN(group_ahead_512, side_by_side, ByGroup<512, Stores::plain>)
PATTERN(group_ahead_1024, side_by_side, ByGroup<1024, Stores::plain>)
PATTERN(group_ahead_2048, side_by_side, ByGroup<2048, Stores::plain>)
PATTERN(group_ahead_1024_apart, apart, ByGroup<1024, Stores::plain>)
PATTERN(group_ahead_1024_past_cache, side_by_side, ByGroup<1024, Stores::past_cache>)
PATTERN(group_ahead_1024_new_lines_past_cache, side_by_side, ByGroup<1024, Stores::past_cache_where_only_written>)
PATTERN(page, side_by_side, ByPage<1024, 0, Stores::plain>)
PATTERN(page_ahead_1024, side_by_side, ByPage<1024, 1024, Stores::plain>)
PATTERN(page_ahead_1024_new_lines_past_cache, side_by_side, ByPage<1024, 1024, Stores::past_cache_where_only_written>)
