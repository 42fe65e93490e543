// Attention of short sequences: keys and values of one (sequence, head) lie whole in shared memory, a warp's scores of
// 16 queries whole in registers, so the softmax is not an online one. Forward only.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/simt.h"

namespace fastbert::cuda {
namespace {

using std::int32_t;
using std::int64_t;

constexpr int WARP = 32, TILE = 16, WARPS = 4, LONGEST = 128;
constexpr int PAD = 8;  // elements between rows in shared memory: the eight rows of a matrix hit different banks
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Row maximum or sum: the four lanes of a row hold its columns.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Queries [tile, tile + 16) of one head. KT: 16-feature steps that registers are kept for; K of them are used.
template <class T, int KT>
__device__ __forceinline__ void attend_tile(const T* q, const T* keys, const T* values, T* out, float* lse, int tile,
                                            int length, int H, int K, float scale_log2) {
  constexpr int PAIRS = LONGEST / TILE;
  const int lane = threadIdx.x % WARP, stride = K + PAD, steps = K / TILE, pairs = (length + TILE - 1) / TILE;
  const int rows[2] = {tile + lane / 4, tile + lane / 4 + 8}, column = lane % 4 * 2;
  const int64_t token = 3 * static_cast<int64_t>(H) * K;

  unsigned a[KT][4];
#pragma unroll
  for (int k = 0; k < KT; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const bool inside = k < steps && rows[r % 2] < length;
      const T* at = q + rows[r % 2] * token + k * TILE + r / 2 * 8 + column;
      a[k][r] = inside ? *reinterpret_cast<const unsigned*>(at) : 0u;
    }

  float scores[2 * PAIRS][4];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    for (int r = 0; r < 4; ++r) scores[2 * p][r] = scores[2 * p + 1][r] = 0.0f;
    if (p >= pairs) continue;
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      if (k >= steps) continue;
      unsigned b[4];  // two tiles of 8 keys, each in two halves of 8 features
      ldmatrix(b, keys + (p * TILE + lane / 16 * 8 + lane % 8) * stride + k * TILE + lane / 8 % 2 * 8);
      mma<T>(scores[2 * p], a[k], b[0], b[1]);
      mma<T>(scores[2 * p + 1], a[k], b[2], b[3]);
    }
  }

  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < 2 * PAIRS; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      scores[j][r] = j * 8 + column + r % 2 < length ? scores[j][r] * scale_log2 : -INFINITY;
      top[r / 2] = fmaxf(top[r / 2], scores[j][r]);
    }
#pragma unroll
  for (int i = 0; i < 2; ++i) top[i] = row_max(top[i]);
#pragma unroll
  for (int j = 0; j < 2 * PAIRS; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      scores[j][r] = exp2_fast(scores[j][r] - top[r / 2]);
      total[r / 2] += scores[j][r];
    }
#pragma unroll
  for (int i = 0; i < 2; ++i) total[i] = row_sum(total[i]);

  float sums[2 * KT][4];
#pragma unroll
  for (int f = 0; f < 2 * KT; ++f)
    for (int r = 0; r < 4; ++r) sums[f][r] = 0.0f;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    if (p >= pairs) continue;
    const float(&x)[4] = scores[2 * p], (&y)[4] = scores[2 * p + 1];
    const unsigned probs[4] = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(y[0], y[1]), pack2<T>(y[2], y[3])};
#pragma unroll
    for (int f = 0; f < KT; ++f) {
      if (f >= steps) continue;
      unsigned b[4];  // two tiles of 8 features, each in two halves of 8 keys
      ldmatrix_transposed(b, values + (p * TILE + lane / 8 % 2 * 8 + lane % 8) * stride + f * TILE + lane / 16 * 8);
      mma<T>(sums[2 * f], probs, b[0], b[1]);
      mma<T>(sums[2 * f + 1], probs, b[2], b[3]);
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows[i] >= length) continue;
    T* to = out + static_cast<int64_t>(rows[i]) * H * K + column;
#pragma unroll
    for (int f = 0; f < 2 * KT; ++f)
      if (f < 2 * steps)
        *reinterpret_cast<unsigned*>(to + f * 8) = pack2<T>(sums[f][2 * i] / total[i], sums[f][2 * i + 1] / total[i]);
    if (lane % 4 == 0) lse[static_cast<int64_t>(rows[i]) * H] = LN2 * top[i] + logf(total[i]);
  }
}

// One block a (sequence, head), a warp 16 queries at a time. Reads 6 K and writes 2 K bytes a token: the least.
template <class T, int KT>
__global__ void __launch_bounds__(WARPS * WARP)
    attention_kernel(const T* qkv, const int32_t* cu_seqlens, T* out, float* lse, int H, int K, int max_seqlen,
                     float scale_log2) {
  const int h = static_cast<int>(blockIdx.x % H), s = static_cast<int>(blockIdx.x / H);
  const int64_t start = cu_seqlens[s], token = 3 * static_cast<int64_t>(H) * K;
  const int length = static_cast<int>(cu_seqlens[s + 1] - start);
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int room = (max_seqlen + TILE - 1) / TILE * TILE, stride = K + PAD, chunks = K / 8;
  out += (start * H + h) * K;
  lse += start * H + h;
  if (length > max_seqlen) {  // the host did not look: an answer that nobody can take for one
    for (int64_t i = tid; i < static_cast<int64_t>(length) * K; i += threads)
      out[i / K * H * K + i % K] = from_float<T>(NAN);
    for (int64_t i = tid; i < length; i += threads) lse[i * H] = NAN;
    return;
  }
  T* keys = reinterpret_cast<T*>(shared_memory());
  T* values = keys + room * stride;
  const T* q = qkv + start * token + static_cast<int64_t>(h) * K;
  const T* k = q + static_cast<int64_t>(H) * K;
  const T* v = k + static_cast<int64_t>(H) * K;
  const int padded = (length + TILE - 1) / TILE * TILE;
  for (int i = tid; i < padded * chunks; i += threads) {
    const int row = i / chunks, at = row * stride + i % chunks * 8;
    if (row < length) {
      async_copy16(keys + at, k + row * token + i % chunks * 8);
      async_copy16(values + at, v + row * token + i % chunks * 8);
    } else {  // a probability of 0 must meet a finite value
      *reinterpret_cast<uint4*>(keys + at) = uint4{};
      *reinterpret_cast<uint4*>(values + at) = uint4{};
    }
  }
  async_wait();
  __syncthreads();
  for (int tile = tid / WARP * TILE; tile < length; tile += threads / WARP * TILE)
    attend_tile<T, KT>(q, keys, values, out, lse, tile, length, H, K, scale_log2);
}

template <class T>
const char* attention_of(const void* qkv, const int32_t* cu_seqlens, void* out, float* lse, int64_t S, int H, int K,
                         int max_seqlen, float scale, void* stream) {
  const int tiles = (max_seqlen + TILE - 1) / TILE, warps = tiles < WARPS ? tiles : WARPS;
  const int shared = 2 * tiles * TILE * (K + PAD) * static_cast<int>(sizeof(T));
  const auto kernel = K <= 32 ? attention_kernel<T, 2> : K <= 64 ? attention_kernel<T, 4> : attention_kernel<T, 8>;
  return launch(kernel, static_cast<unsigned>(S * H), warps * WARP, shared, stream, static_cast<const T*>(qkv),
                cu_seqlens, static_cast<T*>(out), lse, H, K, max_seqlen, scale * LOG2E);
}

}  // namespace

const char* attention(const void* qkv, Type type, const int32_t* cu_seqlens, void* out, float* lse, int64_t S, int H,
                      int K, int max_seqlen, float scale, void* stream) {
  if (S == 0 || max_seqlen == 0) return nullptr;
  const auto of = type == Type::float16 ? attention_of<fp16> : attention_of<bf16>;
  return of(qkv, cu_seqlens, out, lse, S, H, K, max_seqlen, scale, stream);
}

}  // namespace fastbert::cuda
