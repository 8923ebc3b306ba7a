// This machine's memory bandwidth with the access patterns of an optimizer step: what no kernel can beat.
// Compiled and called by benchmarks/optimizer.py; independent of the library on purpose.
#include <cstddef>
#include <cstdint>

namespace {

typedef float Line __attribute__((vector_size(32), aligned(4)));  // 8 floats; loads and stores may be misaligned

Line load(const float* p) { return *reinterpret_cast<const Line*>(p); }
void store(float* p, Line line) { *reinterpret_cast<Line*>(p) = line; }

constexpr std::int64_t kBlock = 16384;  // elements

// kAhead: bytes of software prefetch, 0 leaves it to the hardware. 28 bytes an element: parameter, gradient and two
// moments read, all but the gradient written.
template <int kAhead>
void step_mix(float* p, const float* g, float* m, float* v, std::int64_t n) {
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t block = 0; block < n / kBlock; ++block) {
        for (std::int64_t i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
            if constexpr (kAhead > 0) {
                __builtin_prefetch(p + i + kAhead / 4);
                __builtin_prefetch(g + i + kAhead / 4);
                __builtin_prefetch(m + i + kAhead / 4);
                __builtin_prefetch(v + i + kAhead / 4);
            }
            for (std::int64_t k = i; k < i + 16; k += 8) {
                const Line x = load(g + k);
                store(m + k, load(m + k) + x);
                store(v + k, load(v + k) - x);
                store(p + k, load(p + k) * x);
            }
        }
    }
}

// kStreams: places at which a block is read at the same time. 4 bytes an element.
template <int kStreams>
float read(const float* p, std::int64_t n) {
    float sum = 0.0F;
#pragma omp parallel for schedule(dynamic) reduction(+ : sum)
    for (std::int64_t block = 0; block < n / kBlock; ++block) {
        Line lines[kStreams] = {};
        for (std::int64_t i = 0; i < kBlock / kStreams; i += 8) {
            for (int s = 0; s < kStreams; ++s) {
                lines[s] = lines[s] + load(p + block * kBlock + s * (kBlock / kStreams) + i);
            }
        }
        for (int s = 0; s < kStreams; ++s) sum += lines[s][0] + lines[s][7];
    }
    return sum;
}

}  // namespace

extern "C" {
void step_mix_plain(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<0>(p, g, m, v, n); }
void step_mix_512(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<512>(p, g, m, v, n); }
void step_mix_1024(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<1024>(p, g, m, v, n); }
void step_mix_2048(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<2048>(p, g, m, v, n); }
float read_one_stream(const float* p, const float*, const float*, const float*, std::int64_t n) {
    return read<1>(p, n);
}
float read_four_streams(const float* p, const float*, const float*, const float*, std::int64_t n) {
    return read<4>(p, n);
}

// Two arrays copied onto two others. 16 bytes an element.
void copy_two(float* p, const float* g, float* m, const float* v, std::int64_t n) {
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t block = 0; block < n / kBlock; ++block) {
        for (std::int64_t i = block * kBlock; i < (block + 1) * kBlock; i += 8) {
            store(p + i, load(g + i));
            store(m + i, load(v + i));
        }
    }
}
}
