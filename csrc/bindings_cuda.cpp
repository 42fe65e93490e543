// What Python sees of cuda/: addresses, sizes, a device and its stream as integers; fastbert/native_cuda.py checks.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace fastbert {
namespace {

using std::int32_t;
using std::int64_t;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error, const char* what) {
  if (error != nullptr)
    throw std::runtime_error(std::string("fastbert: the CUDA kernel ") + what + " failed: " + error);
}

void* stream_of(int device, Address stream) {
  check(cuda::select_device(device), "launch");
  return at<void>(stream);
}

void plan_lengths(int device, Address stream, Address lengths, Address cu_seqlens, int64_t S) {
  check(cuda::plan_lengths(at<int32_t>(lengths), at<int32_t>(cu_seqlens), S, stream_of(device, stream)),
        "plan_lengths");
}

void plan_mask(int device, Address stream, Address mask, Address cu_seqlens, Address indices, int64_t S, int64_t L) {
  check(cuda::plan_mask(at<std::uint8_t>(mask), at<int32_t>(cu_seqlens), at<int64_t>(indices), S, L,
                        stream_of(device, stream)), "plan_mask");
}

void plan_tokens(int device, Address stream, Address cu_seqlens, Address positions, Address low, Address high,
                 int64_t S, int64_t capacity) {
  check(cuda::plan_tokens(at<int32_t>(cu_seqlens), at<int64_t>(positions), at<int32_t>(low), at<int32_t>(high), S,
                          capacity, stream_of(device, stream)), "plan_tokens");
}

void gather(int device, Address stream, Address x, Address indices, Address out, int64_t count, int64_t num_rows,
            int64_t nbytes, int word) {
  check(cuda::gather(at<void>(x), at<int64_t>(indices), at<void>(out), count, num_rows, nbytes, word,
                     stream_of(device, stream)), "gather");
}

void scatter(int device, Address stream, Address x, Address indices, Address out, int64_t count, int64_t num_rows,
             int64_t nbytes, int word) {
  check(cuda::scatter(at<void>(x), at<int64_t>(indices), at<void>(out), count, num_rows, nbytes, word,
                      stream_of(device, stream)), "scatter");
}

void pool(int device, Address stream, Address hidden, int type, Address cu_seqlens, Address out, Address low,
          Address step, int64_t S, int D, int mode, bool normalize, int output) {
  check(cuda::pool(at<void>(hidden), static_cast<cuda::Type>(type), at<int32_t>(cu_seqlens), at<void>(out),
                   at<float>(low), at<float>(step), S, D, static_cast<cuda::Mode>(mode), normalize,
                   static_cast<cuda::Output>(output), stream_of(device, stream)), "pool");
}

void attention(int device, Address stream, Address qkv, int type, Address cu_seqlens, Address out, Address lse,
               int64_t S, int H, int K, int max_seqlen, float scale) {
  check(cuda::attention(at<void>(qkv), static_cast<cuda::Type>(type), at<int32_t>(cu_seqlens), at<void>(out),
                        at<float>(lse), S, H, K, max_seqlen, scale, stream_of(device, stream)), "attention");
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
  m.def("cuda_plan_lengths", &plan_lengths);
  m.def("cuda_plan_mask", &plan_mask);
  m.def("cuda_plan_tokens", &plan_tokens);
  m.def("cuda_gather", &gather);
  m.def("cuda_scatter", &scatter);
  m.def("cuda_pool", &pool);
  m.def("cuda_attention", &attention);
}

}  // namespace fastbert
