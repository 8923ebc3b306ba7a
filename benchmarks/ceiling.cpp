// This machine's memory bandwidth with the access patterns of an optimizer step: what no kernel can beat.
// Compiled and called by benchmarks/optimizer.py; independent of the library on purpose.
#include <cstddef>
#include <cstdint>

namespace {
// Bytes ahead; 0 leaves everything to the hardware prefetchers.
template <int kAhead, class Body>
void streams(std::int64_t n, const Body& body) {
#pragma omp parallel for schedule(static)
    for (std::int64_t block = 0; block < n / 16384; ++block) {
        for (std::int64_t i = block * 16384; i < (block + 1) * 16384; i += 16) body(i);
    }
}

template <int kAhead>
inline void ahead(const float* p) {
    if constexpr (kAhead > 0) __builtin_prefetch(p + kAhead / 4);
}

// The step's mix: parameter, gradient and two moments read, all but the gradient written. 28 bytes an element.
template <int kAhead>
void step_mix(float* p, const float* g, float* m, float* v, std::int64_t n) {
    streams<kAhead>(n, [=](std::int64_t i) {
        ahead<kAhead>(p + i);
        ahead<kAhead>(g + i);
        ahead<kAhead>(m + i);
        ahead<kAhead>(v + i);
        for (int k = 0; k < 16; ++k) {
            const float x = g[i + k];
            m[i + k] += x;
            v[i + k] -= x;
            p[i + k] *= x;
        }
    });
}
}  // namespace

extern "C" {
void step_mix_plain(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<0>(p, g, m, v, n); }
void step_mix_512(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<512>(p, g, m, v, n); }
void step_mix_1024(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<1024>(p, g, m, v, n); }
void step_mix_2048(float* p, const float* g, float* m, float* v, std::int64_t n) { step_mix<2048>(p, g, m, v, n); }

// All four arrays read, nothing written. 16 bytes an element.
float read_all(const float* p, const float* g, const float* m, const float* v, std::int64_t n) {
    float sum = 0.0F;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (std::int64_t block = 0; block < n / 16384; ++block) {
        float lanes[16] = {};
        for (std::int64_t i = block * 16384; i < (block + 1) * 16384; i += 16) {
            for (int k = 0; k < 16; ++k) lanes[k] += p[i + k] + g[i + k] + m[i + k] + v[i + k];
        }
        for (int k = 0; k < 16; ++k) sum += lanes[k];
    }
    return sum;
}

// One array read. 4 bytes an element.
float read_one(const float* p, const float*, const float*, const float*, std::int64_t n) {
    float sum = 0.0F;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (std::int64_t block = 0; block < n / 16384; ++block) {
        float lanes[16] = {};
        for (std::int64_t i = block * 16384; i < (block + 1) * 16384; i += 16) {
            for (int k = 0; k < 16; ++k) lanes[k] += p[i + k];
        }
        for (int k = 0; k < 16; ++k) sum += lanes[k];
    }
    return sum;
}

// Two arrays copied onto two others. 16 bytes an element.
void copy_two(float* p, const float* g, float* m, const float* v, std::int64_t n) {
    streams<0>(n, [=](std::int64_t i) {
        for (int k = 0; k < 16; ++k) {
            p[i + k] = g[i + k];
            m[i + k] = v[i + k];
        }
    });
}
}
