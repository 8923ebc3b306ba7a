// Steps whose tensors are stored in any other way that dtypes.h names: a warp takes a block of 256 elements that share
// the scales of their 8-bit codes, a lane eight neighbours, which move by up to 128 bits. How they are stored is
// decided by branches that are the same for all threads; the bits are those of cpu/staged.h.
#pragma once

#include "direct.cuh"

namespace lit_fast::cuda {

constexpr int kWarp = 32;
constexpr int kNeighbours = kCodeBlock / kWarp;

// A lane's place: the first of its elements, how many there are (none: at most 0), whether all of them are and lie so
// that they can be moved at once.
struct Place {
    std::int64_t first;
    int count;
    bool whole;
};

template <class T>
__device__ __forceinline__ void read(T (&values)[kNeighbours], void* from, const Place& at) {
    constexpr int kPack = sizeof(T) == 4 ? 4 : 8;
    const T* p = global<const T>(from) + at.first;
#pragma unroll
    for (int i = 0; i < kNeighbours; i += kPack) {
        Pack<T, kPack> pack{};
        if (at.whole) {
            pack = read_pack<kPack>(p + i);
        } else {
#pragma unroll
            for (int e = 0; e < kPack; ++e) {
                if (i + e < at.count) pack.values[e] = p[i + e];
            }
        }
#pragma unroll
        for (int e = 0; e < kPack; ++e) values[i + e] = pack.values[e];
    }
}

template <class T>
__device__ __forceinline__ void write(void* to, const T (&values)[kNeighbours], const Place& at) {
    constexpr int kPack = sizeof(T) == 4 ? 4 : 8;
    T* p = global<T>(to) + at.first;
#pragma unroll
    for (int i = 0; i < kNeighbours; i += kPack) {
        if (at.whole) {
            Pack<T, kPack> pack;
#pragma unroll
            for (int e = 0; e < kPack; ++e) pack.values[e] = values[i + e];
            write_pack(p + i, pack);
        } else {
#pragma unroll
            for (int e = 0; e < kPack; ++e) {
                if (i + e < at.count) p[i + e] = values[i + e];
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void read_as(float (&out)[kNeighbours], void* from, const Place& at) {
    T values[kNeighbours];
    read(values, from, at);
#pragma unroll
    for (int e = 0; e < kNeighbours; ++e) out[e] = widen(values[e]);
}

// convert(value, neighbour) -> T
template <class T, class Convert>
__device__ __forceinline__ void write_as(void* to, const float (&in)[kNeighbours], const Place& at,
                                         const Convert& convert) {
    T values[kNeighbours];
#pragma unroll
    for (int e = 0; e < kNeighbours; ++e) values[e] = convert(in[e], e);
    write(to, values, at);
}

__device__ __forceinline__ void read_number(float (&out)[kNeighbours], void* from, Dtype dtype, const Place& at) {
    if (dtype == Dtype::float32) {
        read_as<float>(out, from, at);
    } else if (dtype == Dtype::bfloat16) {
        read_as<bf16>(out, from, at);
    } else {
        read_as<f16>(out, from, at);
    }
}

// chance(neighbour): 16 random bits, asked for where `stochastic`.
template <class Chance>
__device__ __forceinline__ void write_number(void* to, const float (&in)[kNeighbours], Dtype dtype, bool stochastic,
                                             const Place& at, const Chance& chance) {
    if (dtype == Dtype::float32) {
        write(to, in, at);
    } else if (dtype == Dtype::float16) {
        write_as<f16>(to, in, at, [](float x, int) { return nearest_f16(x); });
    } else if (stochastic) {
        write_as<bf16>(to, in, at, [&](float x, int e) { return stochastic_bf16(x, chance(e)); });
    } else {
        write_as<bf16>(to, in, at, [](float x, int) { return nearest_bf16(x); });
    }
}

template <bool kSigned>
__device__ __forceinline__ void read_codes(float (&out)[kNeighbours], void* from, float scale, const Place& at) {
    std::uint8_t codes[kNeighbours];
    read(codes, from, at);
#pragma unroll
    for (int e = 0; e < kNeighbours; ++e) {
        out[e] = kSigned ? decoded_signed(codes[e], scale) : decoded_unsigned(codes[e], scale);
    }
}

template <bool kSigned, class Chance>
__device__ __forceinline__ void write_codes(void* to, float& scale, const float (&in)[kNeighbours], const Place& at,
                                            const Chance& chance) {
    unsigned mine = 0;
#pragma unroll
    for (int e = 0; e < kNeighbours; ++e) {
        const unsigned magnitude = e < at.count ? bits_of(in[e]) & 0x7fffffffU : 0U;
        mine = magnitude > mine ? magnitude : mine;
    }
    const unsigned largest = __reduce_max_sync(0xffffffffU, mine);
    const float of_block = scale_of(largest), inverse = inverse_scale(of_block);
    write_as<std::uint8_t>(to, in, at, [&](float x, int e) {
        return kSigned ? encoded_signed(x, inverse, chance(e)) : encoded_unsigned(x, inverse, chance(e));
    });
    if (threadIdx.x % kWarp == 0) scale = of_block;
}

__device__ __forceinline__ void read_param(float (&out)[kNeighbours], const Row& row, const Storage& s,
                                           const Place& at) {
    if (s.master == Master::float32) {
        read_as<float>(out, row.master, at);
    } else if (s.master == Master::remainder) {
        bf16 upper[kNeighbours];
        std::int16_t remainder[kNeighbours];
        read(upper, row.param, at);
        read(remainder, row.master, at);
#pragma unroll
        for (int e = 0; e < kNeighbours; ++e) out[e] = rebuilt(upper[e], remainder[e]);
    } else {
        read_number(out, row.param, s.param, at);
    }
}

template <class Chance>
__device__ __forceinline__ void write_param(const float (&in)[kNeighbours], const Row& row, const Storage& s,
                                            const Place& at, const Chance& chance) {
    if (s.master == Master::remainder) {
        write_as<bf16>(row.param, in, at, [](float x, int) { return upper_half(x); });
        write_as<std::int16_t>(row.master, in, at, [](float x, int) { return remainder_of(x); });
        return;
    }
    if (s.master == Master::float32) write(row.master, in, at);
    write_number(row.param, in, s.param, s.stochastic && s.master == Master::none, at, chance);
}

// Bytes of one element of the widest access decide: eight neighbours of 4 or 2 bytes move by 128 bits, of 1 by 64.
__device__ __forceinline__ bool movable(Row& row, unsigned form, const Storage& s) {
    std::uint64_t bits = 0;
    const auto add = [&](const void* p) { bits |= reinterpret_cast<std::uint64_t>(p); };
    add(row.param);
    add(row.grad);
    if (s.master != Master::none) add(row.master);
    for (int k = 0; k < kMaxStates; ++k) {
        if (uses(form, k)) bits |= reinterpret_cast<std::uint64_t>(row.state[k]) << (s.state == Dtype::uint8 ? 1 : 0);
    }
    return bits % 16 == 0;
}

template <class Formula, unsigned kForm, int k = 0>
__device__ __forceinline__ void read_states(float (&values)[Formula::states][kNeighbours], const Row& row,
                                            const Storage& s, const Place& at, std::int64_t block) {
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) {
            if (s.state == Dtype::uint8) {
                const float scale = global<const float>(row.code_scale[k])[block];
                read_codes<uses(Formula::signed_states, k)>(values[k], row.state[k], scale, at);
            } else {
                read_number(values[k], row.state[k], s.state, at);
            }
        }
        read_states<Formula, kForm, k + 1>(values, row, s, at, block);
    }
}

template <class Formula, unsigned kForm, int k = 0>
__device__ __forceinline__ void write_states(const float (&values)[Formula::states][kNeighbours], const Row& row,
                                             const Storage& s, const Place& at, std::int64_t block,
                                             const std::uint32_t (&random)[kNeighbours]) {
    if constexpr (k < Formula::states) {
        if constexpr (uses(kForm, k)) {
            const auto chance = [&](int e) { return state_bits(random[e], k); };
            if (s.state == Dtype::uint8) {
                float& scale = global<float>(row.code_scale[k])[block];
                write_codes<uses(Formula::signed_states, k)>(row.state[k], scale, values[k], at, chance);
            } else {
                write_number(row.state[k], values[k], s.state, s.stochastic, at, [&](int e) { return chance(e) >> 4; });
            }
        }
        write_states<Formula, kForm, k + 1>(values, row, s, at, block, random);
    }
}

template <class Formula, unsigned kForm>
__global__ void __launch_bounds__(kThreads)
    staged_kernel(const __grid_constant__ StepTable table, const __grid_constant__ DeviceScale device_scale) {
    __shared__ Work work;
    __shared__ bool all_movable;
    const bool left_out = is_left_out(device_scale);
    if (threadIdx.x == 0) {
        find_work<kMeasured<Formula>>(table, kForm, work);
        all_movable = movable(work.row, kForm, table.storage);
    }
    __syncthreads();
    if (left_out) return;
    const typename Formula::Coefficients c = coefficients_of<Formula>(work);
    const Storage storage = table.storage;
    const Row& row = work.row;
    GradientScale scale = resolve(device_scale);
    scale.scale = __fmul_rn(scale.scale, c.gradient_sign);
    const bool rounds_by_chance = storage.stochastic || storage.state == Dtype::uint8;

    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - row.first_chunk) * kChunk;
    const std::int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const Word seed = work.coefficients[kBlockWords], step = work.coefficients[kBlockWords + 1];
    const std::uint64_t first = row.first_index + static_cast<std::uint64_t>(begin);
    RandomKey key = random_key(seed, step, first);
    for (std::int64_t at = begin + threadIdx.x / kWarp * kCodeBlock; at < end; at += kThreads / kWarp * kCodeBlock) {
        Place place;
        place.first = at + lane * kNeighbours;
        place.count = static_cast<int>(end - at < kCodeBlock ? end - at : kCodeBlock) - lane * kNeighbours;
        place.whole = all_movable && place.count >= kNeighbours;

        float param[kNeighbours], grad[kNeighbours], state[Formula::states][kNeighbours];
        read_param(param, row, storage, place);
        read_number(grad, row.grad, storage.grad, place);
        read_states<Formula, kForm>(state, row, storage, place, at / kCodeBlock);
        std::uint32_t random[kNeighbours];
        if (rounds_by_chance) {
            const std::uint64_t index = row.first_index + static_cast<std::uint64_t>(at);
            if (index >> 32 != first >> 32) key = random_key(seed, step, index);
#pragma unroll
            for (int e = 0; e < kNeighbours; ++e) {
                random[e] = random_bits(
                    static_cast<std::uint32_t>(index) + static_cast<std::uint32_t>(lane * kNeighbours + e), key);
            }
        } else {
#pragma unroll
            for (int e = 0; e < kNeighbours; ++e) random[e] = 0;
        }
#pragma unroll
        for (int e = 0; e < kNeighbours; ++e) {
            Lane p(param[e]);
            Lane s[Formula::states];
#pragma unroll
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) s[k] = Lane(state[k][e]);
            }
            update<Formula, kForm>(c, scale, p, Lane(grad[e]), s);
            param[e] = p.value;
#pragma unroll
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) state[k][e] = s[k].value;
            }
        }
        write_states<Formula, kForm>(state, row, storage, place, at / kCodeBlock, random);
        write_param(param, row, storage, place, [&](int e) { return param_bits(random[e]); });
    }
}

}  // namespace lit_fast::cuda
