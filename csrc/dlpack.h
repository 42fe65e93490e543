// The part of DLPack 1.3's C ABI that we read: a tensor's description, and the table of functions behind
// torch.Tensor.__dlpack_c_exchange_api__ (torch >= 2.11). Stable by its specification; https://dmlc.github.io/dlpack
#pragma once
#include <cstdint>

extern "C" {

struct DLTensor {
  void* data;
  std::int32_t device_type;  // 1 is the CPU, 2 is CUDA
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;  // 0 int, 2 float, 4 bfloat, 6 bool
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; -1 with a Python exception set
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};
}
