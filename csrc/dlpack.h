// The part of the DLPack 1.x ABI that reads a torch tensor without Python calls: type.__dlpack_c_exchange_api__.
// Declared from the public specification, https://dmlc.github.io/dlpack/latest/c_api.html; names are ours.
#pragma once

#include <cstdint>

namespace lit_fast::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

constexpr std::int32_t kCpu = 1;
constexpr std::int32_t kCuda = 2;
constexpr std::uint8_t kSigned = 0;
constexpr std::uint8_t kUnsigned = 1;
constexpr std::uint8_t kFloat = 2;
constexpr std::uint8_t kBfloat = 4;

struct Tensor {
    void* data;
    std::int32_t device_type;
    std::int32_t device_id;
    std::int32_t ndim;
    std::uint8_t dtype_code;
    std::uint8_t dtype_bits;
    std::uint16_t dtype_lanes;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct ExchangeApi {
    std::uint32_t major, minor;
    ExchangeApi* previous;
    // Functions return 0, or -1 with a Python exception set.
    void* allocate_managed;
    void* managed_from_object;
    void* object_from_managed;
    int (*tensor_from_object)(void* object, Tensor* out);  // borrowed: valid while the object lives
    int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace lit_fast::dlpack
