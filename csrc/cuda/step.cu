// The formulas on CUDA: one lane a thread, one block a chunk, one launch for up to kMaxTensors tensors.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../backend.h"
#include "../check.h"
#include "lane.cuh"
#include "table.h"

namespace lit_fast::cuda {
namespace {

__device__ __forceinline__ GradientScale resolve(const DeviceScale& s) {
    GradientScale scale;
    scale.scale = s.scale;
    if (s.max_norm >= 0.0F) scale.scale = __fmul_rn(scale.scale, clip_coefficient(*s.norm, s.max_norm));
    scale.limit = s.limit;
    return scale;
}

// The entry whose chunks contain this block.
template <class Table>
__device__ __forceinline__ int tensor_of_block(const Table& table) {
    const int block = static_cast<int>(blockIdx.x);
    int low = 0, high = table.tensor_count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.tensors[middle].first_chunk <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

template <class Formula, unsigned kForm>
__device__ __forceinline__ void update(const typename Formula::Coefficients& c, const GradientScale& scale, Lane& param,
                                       Lane grad, Lane (&state)[Formula::states]) {
    // Order of the vector loop everywhere: torch's CUDA kernels have no remainder loop to agree with.
    Formula::template update<Fused::second_product, kForm>(c, param, scaled_gradient(scale, grad), state);
}

// param, grad: [numel] P, state: [numel] S each, same layout. kForm: see formulas/math.h.
template <class Formula, unsigned kForm, class P, class S>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ StepTable table, const __grid_constant__ DeviceScale device_scale) {
    constexpr int kPack = 16 / static_cast<int>(sizeof(P));  // elements of one 128-bit access
    const TensorEntry& t = table.tensors[tensor_of_block(table)];

    __shared__ typename Formula::Coefficients shared;
    if (threadIdx.x == 0) {
        const CoefficientEntry& entry = table.coefficients[t.coefficients];
        if (t.step != nullptr) {
            shared = Formula::coefficients(entry.options, static_cast<double>(*t.step), false);
        } else {
            memcpy(&shared, entry.block.bytes, sizeof(shared));
        }
    }
    __syncthreads();
    const typename Formula::Coefficients c = shared;
    GradientScale scale = resolve(device_scale);
    scale.scale = __fmul_rn(scale.scale, c.gradient_sign);

    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - t.first_chunk) * kChunk;
    const std::int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
    P* param = static_cast<P*>(t.param);
    const P* grad = static_cast<const P*>(t.grad);
    S* state[kMaxStates];
    for (int k = 0; k < kMaxStates; ++k) state[k] = static_cast<S*>(t.state[k]);
    bool packed = aligned<P, kPack>(param) && aligned<P, kPack>(grad);
    for (int k = 0; k < Formula::states; ++k) {
        if (uses(kForm, k)) packed = packed && aligned<S, kPack>(state[k]);
    }

    const std::int64_t packed_end = packed ? begin + (end - begin) / kPack * kPack : begin;
    for (std::int64_t i = begin + threadIdx.x * kPack; i < packed_end; i += kThreads * kPack) {
        Pack<P, kPack> p = *reinterpret_cast<const Pack<P, kPack>*>(param + i);
        const Pack<P, kPack> g = *reinterpret_cast<const Pack<P, kPack>*>(grad + i);
        Pack<S, kPack> s[Formula::states];
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) s[k] = *reinterpret_cast<const Pack<S, kPack>*>(state[k] + i);
        }
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
            Lane lane = load(p.values[e]);
            Lane lanes[Formula::states];
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) lanes[k] = load(s[k].values[e]);
            }
            update<Formula, kForm>(c, scale, lane, load(g.values[e]), lanes);
            for (int k = 0; k < Formula::states; ++k) {
                if (uses(kForm, k)) store(s[k].values[e], lanes[k]);
            }
            store(p.values[e], lane);
        }
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) *reinterpret_cast<Pack<S, kPack>*>(state[k] + i) = s[k];
        }
        *reinterpret_cast<Pack<P, kPack>*>(param + i) = p;
    }
    // What is misaligned or does not fill a pack, an element a thread.
    for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
        Lane lane = load(param[i]);
        Lane lanes[Formula::states];
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) lanes[k] = load(state[k][i]);
        }
        update<Formula, kForm>(c, scale, lane, load(grad[i]), lanes);
        for (int k = 0; k < Formula::states; ++k) {
            if (uses(kForm, k)) store(state[k][i], lanes[k]);
        }
        store(param[i], lane);
    }
}

// counters: step counts on the device; this step's numbers after it.
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ CounterTable table) {
    const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i < table.count) *table.counters[i] += 1.0F;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ GradTable table, const __grid_constant__ DeviceScale device_scale) {
    const GradTable::Entry& t = table.tensors[tensor_of_block(table)];
    const GradientScale scale = resolve(device_scale);
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - t.first_chunk) * kChunk;
    const std::int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
    T* grad = static_cast<T*>(t.data);
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        store(grad[i], scaled_gradient(scale, load(grad[i])));
    }
}

// Sum over the block in a fixed order, in thread 0.
__device__ __forceinline__ double block_sum(double mine) {
    __shared__ double sums[kThreads];
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

// partial: [chunks of this launch], the sum of squares of each chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) square_kernel(const __grid_constant__ GradTable table, double* partial) {
    constexpr int kPack = 16 / static_cast<int>(sizeof(T));
    const GradTable::Entry& t = table.tensors[tensor_of_block(table)];
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - t.first_chunk) * kChunk;
    const std::int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
    const T* grad = static_cast<const T*>(t.data);
    const std::int64_t packed_end = aligned<T, kPack>(grad) ? begin + (end - begin) / kPack * kPack : begin;
    Wide sum{0.0};
    for (std::int64_t i = begin + threadIdx.x * kPack; i < packed_end; i += kThreads * kPack) {
        const Pack<T, kPack> g = *reinterpret_cast<const Pack<T, kPack>*>(grad + i);
#pragma unroll
        for (int e = 0; e < kPack; ++e) add_square(sum, Wide{static_cast<double>(load(g.values[e]).value)});
    }
    for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
        add_square(sum, Wide{static_cast<double>(load(grad[i]).value)});
    }
    const double total = block_sum(sum.value);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One block. norm: one float32; the norm of all gradients times |scale|.
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const double* partial, std::int64_t count, double scale, float* norm) {
    double mine = 0.0;
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) mine += partial[i];
    const double total = block_sum(mine);
    if (threadIdx.x == 0) *norm = static_cast<float>(::sqrt(total) * scale);
}

// ---- launchers ----

template <class T>
struct Exactly {
    using type = T;
};

// The API instead of <<<>>>: with it this file is ordinary C++, which tests run on a CPU.
template <class... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), std::int64_t blocks, const CudaStream& on,
            const typename Exactly<Parameters>::type&... arguments) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), pointers, 0,
                                               static_cast<cudaStream_t>(on.stream));
    if (error != cudaSuccess) {
        throw KernelError("CUDA " + std::string(what) + " could not be launched: " + cudaGetErrorString(error));
    }
}

void use_device(int index) {
    const cudaError_t error = cudaSetDevice(index);
    if (error != cudaSuccess) {
        throw KernelError("CUDA device " + std::to_string(index) + " cannot be used: " + cudaGetErrorString(error));
    }
}

std::int64_t chunks_of(std::int64_t numel) { return (numel + kChunk - 1) / kChunk; }

using StepKernelPointer = void (*)(StepTable, DeviceScale);

template <class Formula, unsigned kForm>
StepKernelPointer kernel_for(Layout layout) {
    switch (layout) {
        case Layout::float32:
            return step_kernel<Formula, kForm, float, float>;
        case Layout::bfloat16:
            return step_kernel<Formula, kForm, bf16, bf16>;
        case Layout::float32_bfloat16_state:
            return step_kernel<Formula, kForm, float, bf16>;
        case Layout::staged:
            break;
    }
    throw KernelError("the layout has no CUDA kernel.");
}

template <class Formula, int index = 0>
StepKernelPointer kernel_for(Layout layout, unsigned form) {
    if constexpr (index < static_cast<int>(sizeof(Formula::forms) / sizeof(Formula::forms[0]))) {
        if (form == Formula::forms[index]) return kernel_for<Formula, Formula::forms[index]>(layout);
        return kernel_for<Formula, index + 1>(layout, form);
    } else {
        throw KernelError("the form has no CUDA kernel.");
    }
}

StepKernelPointer kernel_for(FormulaId formula, Layout layout, unsigned form) {
    switch (formula) {
#define LIT_FAST_ENTRY(Formula) \
    case FormulaId::Formula:    \
        return kernel_for<Formula>(layout, form);
        LIT_FAST_FORMULAS(LIT_FAST_ENTRY)
#undef LIT_FAST_ENTRY
        case FormulaId::count:
            break;
    }
    throw KernelError("the formula has no CUDA kernel.");
}

DeviceScale device_scale(const CudaClip& clip) {
    return {clip.scale.scale, clip.max_norm, clip.scale.limit, clip.norm};
}

// Calls visit(table, blocks) for as few tables as hold all of `grads` with dtype `wanted`.
template <class Visit>
void for_each_table(const std::vector<Span>& grads, Dtype wanted, const Visit& visit) {
    GradTable table;
    table.tensor_count = 0;
    std::int64_t blocks = 0;
    const auto flush = [&] {
        if (blocks > 0) visit(table, blocks);
        table.tensor_count = 0;
        blocks = 0;
    };
    for (const Span& grad : grads) {
        if (grad.dtype != wanted || grad.numel == 0) continue;
        if (table.tensor_count == kMaxTensors || blocks + chunks_of(grad.numel) > 0x7fffffff) flush();
        table.tensors[table.tensor_count++] = {grad.data, grad.numel, static_cast<std::int32_t>(blocks)};
        blocks += chunks_of(grad.numel);
    }
    flush();
}

}  // namespace
}  // namespace lit_fast::cuda

namespace lit_fast {

std::int64_t cuda_norm_chunks(const std::vector<Span>& grads) {
    std::int64_t chunks = 0;
    for (const Span& grad : grads) chunks += cuda::chunks_of(grad.numel);
    return chunks;
}

void cuda_norm(const std::vector<Span>& grads, double scale, double* partial, float* norm, const CudaStream& on) {
    cuda::use_device(on.device);
    std::int64_t done = 0;
    const auto sum = [&](auto kernel, Dtype dtype) {
        cuda::for_each_table(grads, dtype, [&](const cuda::GradTable& table, std::int64_t blocks) {
            cuda::launch("sum of squares", kernel, blocks, on, table, partial + done);
            done += blocks;
        });
    };
    sum(cuda::square_kernel<float>, Dtype::float32);
    sum(cuda::square_kernel<bf16>, Dtype::bfloat16);
    cuda::launch("norm", cuda::norm_kernel, 1, on, partial, done, scale, norm);
}

void cuda_scale(const std::vector<Span>& grads, const CudaClip& clip, const CudaStream& on) {
    cuda::use_device(on.device);
    const cuda::DeviceScale scale = cuda::device_scale(clip);
    const auto run = [&](auto kernel, Dtype dtype) {
        cuda::for_each_table(grads, dtype, [&](const cuda::GradTable& table, std::int64_t blocks) {
            cuda::launch("gradient scale", kernel, blocks, on, table, scale);
        });
    };
    run(cuda::scale_kernel<float>, Dtype::float32);
    run(cuda::scale_kernel<bf16>, Dtype::bfloat16);
}

void cuda_count_steps(const std::vector<float*>& counters, const CudaStream& on) {
    cuda::use_device(on.device);
    cuda::CounterTable table;
    for (std::size_t begin = 0; begin < counters.size(); begin += cuda::kMaxCounters - 1) {
        const std::size_t count = std::min<std::size_t>(counters.size() - begin, cuda::kMaxCounters - 1);
        std::copy_n(counters.begin() + static_cast<std::ptrdiff_t>(begin), count, table.counters);
        table.count = static_cast<std::int32_t>(count);
        const std::int64_t blocks = (table.count + cuda::kThreads - 1) / cuda::kThreads;
        cuda::launch("step count", cuda::count_kernel, blocks, on, table);
    }
}

void cuda_step(const StepBatch& batch, const CudaClip& clip, const CudaStream& on) {
    cuda::use_device(on.device);
    const cuda::DeviceScale scale = cuda::device_scale(clip);
    for (const Layout layout : {Layout::float32, Layout::bfloat16, Layout::float32_bfloat16_state}) {
        for (unsigned set = 0; set < 1U << kMaxStates; ++set) {
            const unsigned form = set | kGeneral;
            cuda::StepTable table;
            std::int64_t blocks = 0;
            std::int32_t coefficients = 0, last = -1;
            table.tensor_count = 0;
            const auto flush = [&] {
                if (blocks > 0) {
                    cuda::launch("optimizer step", cuda::kernel_for(batch.formula, layout, form), blocks, on, table,
                                 scale);
                }
                table.tensor_count = 0;
                blocks = 0;
                coefficients = 0;
                last = -1;
            };
            for (const StepTask& task : batch.tasks) {
                if (task.layout != layout || (task.form | kGeneral) != form || task.numel == 0) continue;
                if (table.tensor_count == cuda::kMaxTensors || coefficients == cuda::kMaxCoefficients ||
                    blocks + cuda::chunks_of(task.numel) > 0x7fffffff) {
                    flush();
                }
                if (task.coefficients != last) {
                    const auto from = static_cast<std::size_t>(task.coefficients);
                    cuda::CoefficientEntry& entry = table.coefficients[coefficients++];
                    if (task.step != nullptr) {
                        std::copy_n(batch.options[from].values, kMaxOptions, entry.options);
                    } else {
                        entry.block = batch.coefficients[from];
                    }
                    last = task.coefficients;
                }
                cuda::TensorEntry& entry = table.tensors[table.tensor_count++];
                entry.param = task.param;
                entry.grad = task.grad;
                std::copy_n(task.state, kMaxStates, entry.state);
                entry.step = task.step;
                entry.numel = task.numel;
                entry.first_chunk = static_cast<std::int32_t>(blocks);
                entry.coefficients = coefficients - 1;
                blocks += cuda::chunks_of(task.numel);
            }
            flush();
        }
    }
}

}  // namespace lit_fast
