// One vector per sequence, from its tokens to the bytes that are stored: pooled, normalised, quantised in one pass.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/simt.h"

namespace fastbert::cuda {
namespace {

using std::int32_t;
using std::int64_t;

constexpr int THREADS = 256, WARP = 32;

// One block a sequence. Its threads are `groups` teams: a team reads whole tokens, VEC neighbouring features a thread,
// the teams take turns, and their partial sums meet in shared memory in a fixed order. Each hidden byte is read once.
template <class T, int VEC>
__global__ void __launch_bounds__(THREADS)
    pool_kernel(const T* hidden, const int32_t* cu_seqlens, void* out, const float* low, const float* step, int D,
                int groups, Mode mode, bool normalize, Output output) {
  float* partial = reinterpret_cast<float*>(shared_memory());  // (groups, D), then the THREADS / WARP sums of squares
  float* squares = partial + static_cast<int64_t>(groups) * D;
  const int64_t s = blockIdx.x;
  int64_t begin = cu_seqlens[s], end = cu_seqlens[s + 1];
  const int length = static_cast<int>(end - begin);
  if (mode == Mode::cls && length > 0) end = begin + 1;
  if (mode == Mode::lasttoken && length > 0) begin = end - 1;
  const int tid = static_cast<int>(threadIdx.x), vectors = D / VEC, team = vectors < THREADS ? vectors : THREADS;
  const bool is_max = mode == Mode::max, weighted = mode == Mode::weightedmean;

  for (int v = tid % team; v < vectors && tid / team < groups; v += team) {
    float sum[VEC];
    for (int i = 0; i < VEC; ++i) sum[i] = is_max ? -INFINITY : 0.0f;
    for (int64_t token = begin + tid / team; token < end; token += groups) {
      struct alignas(sizeof(T) * VEC) Vector {
        T values[VEC];
      };
      const Vector x = *reinterpret_cast<const Vector*>(hidden + token * D + v * VEC);
      const float weight = weighted ? static_cast<float>(token - begin + 1) : 1.0f;
      for (int i = 0; i < VEC; ++i) {
        const float value = to_float(x.values[i]);
        if (is_max)
          sum[i] = value > sum[i] || value != value ? value : sum[i];
        else
          sum[i] += value * weight;
      }
    }
    for (int i = 0; i < VEC; ++i) partial[static_cast<int64_t>(tid / team) * D + v * VEC + i] = sum[i];
  }
  __syncthreads();

  float divisor = 1.0f;
  if (mode == Mode::mean) divisor = static_cast<float>(length);
  if (mode == Mode::mean_sqrt_len_tokens) divisor = sqrtf(static_cast<float>(length));
  if (weighted) divisor = 0.5f * static_cast<float>(length) * (static_cast<float>(length) + 1.0f);
  float square = 0.0f;
  for (int d = tid; d < D; d += THREADS) {
    float sum = partial[d];
    for (int g = 1; g < groups; ++g) {
      const float value = partial[static_cast<int64_t>(g) * D + d];
      if (is_max)
        sum = value > sum || value != value ? value : sum;
      else
        sum += value;
    }
    partial[d] = length > 0 ? sum / divisor : 0.0f;
    square += partial[d] * partial[d];
  }
  float norm = 1.0f;
  if (normalize) {  // as torch.nn.functional.normalize: x / max(|x|, 1e-12)
    for (int mask = WARP / 2; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
    if (tid % WARP == 0) squares[tid / WARP] = square;
    __syncthreads();
    float total = 0.0f;
    for (int w = 0; w < THREADS / WARP; ++w) total += squares[w];
    norm = sqrtf(total);
    if (norm < 1e-12f) norm = 1e-12f;
  }

  if (output == Output::binary || output == Output::ubinary) {
    __syncthreads();  // a byte holds eight threads' features
    const int nbytes = (D + 7) / 8;
    std::uint8_t* bytes = static_cast<std::uint8_t*>(out) + s * nbytes;
    for (int b = tid; b < nbytes; b += THREADS) {
      unsigned bits = 0;
      for (int i = 0; i < 8; ++i) bits = bits << 1 | (8 * b + i < D && partial[8 * b + i] / norm > 0.0f);
      bytes[b] = static_cast<std::uint8_t>(output == Output::binary ? bits ^ 128u : bits);
    }
    return;
  }
  for (int d = tid; d < D; d += THREADS) {
    const float value = partial[d] / norm;
    const int64_t at = s * D + d;
    if (output == Output::same) {
      static_cast<T*>(out)[at] = from_float<T>(value);
    } else if (output == Output::float32) {
      static_cast<float*>(out)[at] = value;
    } else {
      float level = floorf((value - low[d]) / (step[d] == 0.0f ? 1.0f : step[d]));
      level = level > 0.0f ? (level < 255.0f ? level : 255.0f) : 0.0f;
      const unsigned byte = static_cast<unsigned>(level);
      static_cast<std::uint8_t*>(out)[at] = static_cast<std::uint8_t>(output == Output::int8 ? byte ^ 128u : byte);
    }
  }
}

template <class T>
const char* pool_of(const void* hidden, const int32_t* cu_seqlens, void* out, const float* low, const float* step,
                    int64_t S, int D, Mode mode, bool normalize, Output output, void* stream) {
  constexpr int VEC = 16 / sizeof(T);
  const bool aligned = D % VEC == 0 && reinterpret_cast<std::uintptr_t>(hidden) % 16 == 0;
  const int vectors = aligned ? D / VEC : D;
  const int groups = vectors < THREADS ? (THREADS / vectors < 8 ? THREADS / vectors : 8) : 1;
  const int shared = (groups * D + THREADS / WARP) * static_cast<int>(sizeof(float));
  return launch(aligned ? pool_kernel<T, VEC> : pool_kernel<T, 1>, static_cast<unsigned>(S), THREADS, shared, stream,
                static_cast<const T*>(hidden), cu_seqlens, out, low, step, D, groups, mode, normalize, output);
}

}  // namespace

const char* pool(const void* hidden, Type type, const int32_t* cu_seqlens, void* out, const float* low,
                 const float* step, int64_t S, int D, Mode mode, bool normalize, Output output, void* stream) {
  if (S == 0 || D == 0) return nullptr;
  const auto of = type == Type::float32 ? pool_of<float> : type == Type::float16 ? pool_of<fp16> : pool_of<bf16>;
  return of(hidden, cu_seqlens, out, low, step, S, D, mode, normalize, output, stream);
}

}  // namespace fastbert::cuda
