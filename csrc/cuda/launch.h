// How the host queues a kernel.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../backend.h"
#include "../check.h"
#include "table.h"

namespace lit_fast::cuda {

template <class T>
struct Exactly {
    using type = T;
};

// The API instead of <<<>>>: with it a file of the host's side is ordinary C++, which tests run on a CPU.
template <class... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), std::int64_t blocks, const CudaStream& on,
            const typename Exactly<Parameters>::type&... arguments) {
    check(blocks <= 0x7fffffff, "more elements than one launch can number.");
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), pointers, 0,
                                               static_cast<cudaStream_t>(on.stream));
    if (error != cudaSuccess) {
        throw KernelError("CUDA " + std::string(what) + " could not be launched: " + cudaGetErrorString(error));
    }
}

inline void use_device(int index) {
    const cudaError_t error = cudaSetDevice(index);
    if (error != cudaSuccess) {
        throw KernelError("CUDA device " + std::to_string(index) + " cannot be used: " + cudaGetErrorString(error));
    }
}

}  // namespace lit_fast::cuda
