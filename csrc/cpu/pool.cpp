// One vector per sequence: a segmented reduction over its tokens, or its first or last token.
#include "cpu/table.h"
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// What the weighted sum of a sequence is multiplied with.
INLINE float norm(PoolMode mode, int64_t length) {
  const float n = static_cast<float>(length);
  if (mode == PoolMode::mean_sqrt_len_tokens) return 1.f / __builtin_sqrtf(n);
  return mode == PoolMode::weightedmean ? 1.f / (n * (n + 1.f) / 2.f) : 1.f / n;
}

INLINE float token_weight(PoolMode mode, int64_t place) {
  return mode == PoolMode::weightedmean ? static_cast<float>(place + 1) : 1.f;
}

// The reductions run down NV vectors of columns side by side: a token's row is read in longer pieces, and the
// latency of one column's chain hides behind the others. n is W, or with NV = 1 what the last vector holds.
template <int NV, class T>
INLINE void sum_columns(const T* first, int64_t length, int64_t D, PoolMode mode, float factor, T* to, int n) {
  vf total[NV] = {};
  for (int64_t t = 0; t < length; ++t) {
    const float weight = token_weight(mode, t);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) total[v] += load(first + t * D + v * W, n) * weight;
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store(to + v * W, total[v] * factor, n);
}

template <int NV, class T>
INLINE void max_columns(const T* first, int32_t begin, int32_t length, int64_t D, T* to, int32_t* argmax, int n) {
  vf top[NV];
  vi place[NV] = {};
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) top[v] = load(first + v * W, n);
  for (int32_t t = 1; t < length; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const vf x = load(first + t * D + v * W, n);
      const vi above = ~(x <= top[v]) & (top[v] == top[v]);  // the first NaN wins and stays, as in torch
      top[v] = above ? x : top[v];
      place[v] = above ? vi{} + t : place[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store(to + v * W, top[v], n);
    place[v] += begin;
    memcpy(argmax + v * W, &place[v], n * sizeof(int32_t));
  }
}

constexpr int kColumns = 4;

template <class T>
void pool_fwd(const T* hidden, const int32_t* cu_seqlens, T* out, int32_t* argmax, int64_t S, int64_t D,
              PoolMode mode, int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (cu_seqlens[S] * D > kParallelWork)
  for (int64_t s = 0; s < S; ++s) {
    const int64_t begin = cu_seqlens[s], end = cu_seqlens[s + 1];
    const T* first = hidden + begin * D;
    T* to = out + s * D;
    if (begin == end) {
      memset(static_cast<void*>(to), 0, D * sizeof(T));
      for (int64_t i = 0; argmax && i < D; ++i) argmax[s * D + i] = -1;
    } else if (mode == PoolMode::cls || mode == PoolMode::lasttoken) {
      memcpy(static_cast<void*>(to), mode == PoolMode::cls ? first : hidden + (end - 1) * D, D * sizeof(T));
    } else if (mode == PoolMode::max) {
      int32_t* places = argmax + s * D;
      int64_t i = 0;
      for (; i + kColumns * W <= D; i += kColumns * W)
        max_columns<kColumns>(first + i, begin, end - begin, D, to + i, places + i, W);
      for (; i + W <= D; i += W) max_columns<1>(first + i, begin, end - begin, D, to + i, places + i, W);
      if (i < D) max_columns<1>(first + i, begin, end - begin, D, to + i, places + i, D - i);
    } else {
      const float factor = norm(mode, end - begin);
      int64_t i = 0;
      for (; i + kColumns * W <= D; i += kColumns * W)
        sum_columns<kColumns>(first + i, end - begin, D, mode, factor, to + i, W);
      for (; i + W <= D; i += W) sum_columns<1>(first + i, end - begin, D, mode, factor, to + i, W);
      if (i < D) sum_columns<1>(first + i, end - begin, D, mode, factor, to + i, D - i);
    }
  }
}

template <class T>
void pool_bwd(const T* dout, const int32_t* cu_seqlens, const int32_t* argmax, T* dhidden, int64_t S, int64_t D,
              PoolMode mode) {
#pragma omp parallel for schedule(dynamic, 4) if (cu_seqlens[S] * D > kParallelWork)
  for (int64_t s = 0; s < S; ++s) {
    const int64_t begin = cu_seqlens[s], end = cu_seqlens[s + 1];
    const T* from = dout + s * D;
    T* first = dhidden + begin * D;
    if (begin == end) continue;
    if (mode == PoolMode::cls || mode == PoolMode::lasttoken) {
      memset(static_cast<void*>(first), 0, (end - begin) * D * sizeof(T));
      memcpy(static_cast<void*>(mode == PoolMode::cls ? first : dhidden + (end - 1) * D), from, D * sizeof(T));
    } else if (mode == PoolMode::max) {
      memset(static_cast<void*>(first), 0, (end - begin) * D * sizeof(T));
      for (int64_t i = 0; i < D; ++i) dhidden[argmax[s * D + i] * D + i] = from[i];
    } else {
      const float factor = norm(mode, end - begin);
      for (int64_t t = 0; t < end - begin; ++t) {
        const float weight = token_weight(mode, t) * factor;
        each_vector(D, [&](int64_t i, int n) LAMBDA { store(first + t * D + i, load(from + i, n) * weight, n); });
      }
    }
  }
}

}  // namespace

template <class T>
void add_pool(Kernels<T>& table) {
  table.pool_fwd = pool_fwd;
  table.pool_bwd = pool_bwd;
}
template void add_pool(Kernels<float>&);
template void add_pool(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
