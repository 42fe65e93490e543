// Vectors of W floats in the compiler's own vector extension, and the few functions of them that the kernels need.
// Everything here has internal linkage and nothing comes from the STL: an inline function compiled for one
// instruction set and folded by the linker into a file of another would fault on a lesser CPU.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastbert::FASTBERT_ISA {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

// Elements a kernel must touch before it is worth waking the other threads (about 5 us of work).
constexpr int64_t kParallelWork = 1 << 14;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE vf splat(float x) { return x - vf{}; }
INLINE vu splat(uint32_t x) { return x - vu{}; }
INLINE vf as_float(vu x) { return (vf)x; }
INLINE vu as_bits(vf x) { return (vu)x; }

// Lane numbers 0, 1, ..., W - 1.
INLINE vu lanes() {
  vu x{};
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

INLINE vf widen(vh x) { return as_float(__builtin_convertvector(x, vu) << 16); }

// Round to nearest even; NaN stays NaN.
INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu bits = as_bits(x);
  const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40u), vh);
#endif
}

INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE vf load(const bf16* p) {
  vh x;
  memcpy(&x, p, sizeof x);
  return widen(x);
}
INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
INLINE void store(bf16* p, vf x) {
  const vh half = narrow(x);
  memcpy(p, &half, sizeof half);
}

// The first n lanes, the others 0. With a constant n == W this is a plain load.
template <class T>
INLINE vf load(const T* p, int n) {
  if (n == W) return load(p);
  T lane[W] = {};
  memcpy(lane, p, n * sizeof(T));
  return load(lane);
}
template <class T>
INLINE void store(T* p, vf x, int n) {
  if (n == W) return store(p, x);
  T lane[W];
  store(lane, x);
  memcpy(p, lane, n * sizeof(T));
}

// The first n lanes of x, the others 0.
INLINE vf first(vf x, int n) { return lanes() < splat(static_cast<uint32_t>(n)) ? x : vf{}; }

INLINE float get(float x) { return x; }
INLINE float get(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// f(offset, lanes) over n elements: whole vectors, then the rest.
template <class F>
INLINE void each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, static_cast<int>(n - i));
}

INLINE float sum(vf x) {
  float total = 0.f;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}
// The same in the order that is fastest.
INLINE float quick_sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  return sum(x);
#endif
}
// a > b ? a : b in one instruction: where one is NaN the result is b. Compilers will not see it through the NaN rule.
INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
INLINE float max(vf x) {
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
  return top;
}
// The same where no lane is NaN.
INLINE float quick_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  return max(x);
#endif
}

#if defined(__AVX512F__)
// Of 16 rows of 16 words: interleaving the first half of the rows with the second, log2(W) times, transposes.
INLINE void transpose(__m512 rows[W]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    __m512 mixed[W];
#pragma GCC unroll 8
    for (int r = 0; r < W / 2; ++r) {
      mixed[2 * r] = _mm512_permutex2var_ps(rows[r], low, rows[r + W / 2]);
      mixed[2 * r + 1] = _mm512_permutex2var_ps(rows[r], high, rows[r + W / 2]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) rows[r] = mixed[r];
  }
}
#endif

// e^x, about 1 ulp, for x held to [-87.3, 88.3]: it never underflows to 0 nor overflows. NaN of NaN.
INLINE vf exp(vf x) {
  const vf clamped = min(splat(88.3f), max(splat(-87.3f), x));
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = clamped * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  return p * as_float((as_bits(shifted) - as_bits(magic) + 127u) << 23);
}

// lowbias32, see fastbert/ops/dropout.py.
template <class U>
INLINE U hash32(U x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Dropout of one row: columns col .. col + W - 1 of x kept and scaled, or 0.
class RowDropout {
 public:
  RowDropout(const Dropout& dropout, int64_t row)
      : dropout_(dropout), row_(hash32(static_cast<uint32_t>(row) ^ hash32(dropout.seed))) {}
  INLINE vf operator()(vf x, int64_t col) const {
    if (dropout_.threshold == 0) return x;
    const vu bits = hash32(lanes() + (row_ + static_cast<uint32_t>(col)));
    return bits >= splat(dropout_.threshold) ? x * dropout_.scale : vf{};
  }

 private:
  Dropout dropout_;
  uint32_t row_;
};

// Cache-line aligned floats, freed at the end of the scope.
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<float*>(aligned_alloc(64, round_up(size * 4 + 64, 64)))) {
    if (data_ == nullptr) abort();  // inside a parallel region nothing can be thrown
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

// Sums over rows: rows are cut into chunks by their number alone, each chunk has its own partial sums, and the partial
// sums are added in order. So the result does not depend on the number of threads.
struct RowChunks {
  int64_t rows, count, size;
  explicit RowChunks(int64_t rows_) : rows(rows_) {
    count = (rows + 15) / 16;
    if (count > 64) count = 64;
    size = count ? (rows + count - 1) / count : 0;
  }
  int64_t begin(int64_t chunk) const { return clip(chunk * size); }
  int64_t end(int64_t chunk) const { return clip((chunk + 1) * size); }

 private:
  int64_t clip(int64_t row) const { return row < rows ? row : rows; }
};

// out[i] = sum over chunks of partial[chunk * stride + i], i < n.
inline void add_chunks(const float* partial, int64_t count, int64_t stride, float* out, int64_t n) {
  each_vector(n, [&](int64_t i, int lanes) LAMBDA {
    vf total{};
    for (int64_t chunk = 0; chunk < count; ++chunk) total += load(partial + chunk * stride + i, lanes);
    store(out + i, total, lanes);
  });
}

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
