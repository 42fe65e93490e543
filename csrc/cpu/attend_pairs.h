// Attention of one head of one sequence inside the encoder, with products of bf16; softmax and all sums are fp32.
//
// Both products are the panel tile of gemm.h with 32 queries side by side: scores (key, query) = K Q^T, out (k, query) =
// V^T P. Maximum and sum of a softmax need no steps across lanes.
#pragma once
#include "cpu/attend.h"

namespace fastbert::FASTBERT_ISA {
namespace {

#if defined(__AVX512BF16__)

// 2^t for t <= 0, off by 7.5e-5 of it (P is rounded to bf16, far coarser): 0 where it underflows, NaN of NaN.
INLINE vf exp2_coarse(vf t) {
  const vf f = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
  const vf p = ((f * 0.07802452f + 0.22606718f) * f + 0.69583351f) * f + 0.99992522f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)t);
}

// (low, high) of each lane side by side: how a panel holds two rows of its depth.
INLINE void store_pairs(bf16* to, vf low, vf high) {
  alignas(64) static constexpr uint16_t kPlaces[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), halves));
}

// What one head of a sequence needs: its keys and transposed values as a product reads them, and room for 32 queries.
struct PairScratch {
  int64_t ldk, ldv, size_rows, size_block;
  bf16 *keys, *values, *queries, *p;
  float *scores, *wide;

  PairScratch(int64_t length, int64_t K) : ldk(round_up(K, kColumns)), ldv(round_up(length, kColumns)) {
    size_rows = round_up(length, kRows<bf16>) * ldk;
    size_block = round_up(K, kRows<bf16>) * ldv;
  }
  // In floats.
  int64_t size() const { return (size_rows + size_block + (ldk + ldv) * kColumns) / 2 + (larger() + ldk) * kColumns; }
  void place(float* memory) {
    keys = reinterpret_cast<bf16*>(memory);
    values = keys + size_rows;
    queries = values + size_block;
    p = queries + ldk * kColumns;
    scores = reinterpret_cast<float*>(p + ldv * kColumns);
    wide = scores + larger() * kColumns;
  }

 private:
  int64_t larger() const { return ldk > ldv ? ldk : ldv; }
};

// kColumns queries at most, NV * W of them real.
template <int NV, class T>
INLINE void attend_pairs_block(const float* q, int64_t ld, int64_t count, int64_t length, int64_t K, float scale,
                               const float* bias, const PairScratch& at, T* out, int64_t ldo) {
  transpose(q, ld, count, K, at.wide, kColumns);
  for (int64_t k = 0; k < at.ldk; k += 2)
    for (int i = 0; i < NV * W; i += W)
      store_pairs(at.queries + k * kColumns + 2 * i, k < K ? load(at.wide + k * kColumns + i) : vf{},
                  k + 1 < K ? load(at.wide + (k + 1) * kColumns + i) : vf{});
  each_tile<bf16>(length, [&](int64_t j, int64_t rows) LAMBDA {
    panel_tile<NV>(rows, K, at.keys + j * at.ldk, at.ldk, at.queries, nullptr, 0, at.scores + j * kColumns, kColumns);
  });
  vf inverse[NV];
  for (int v = 0; v < NV; ++v) {
    float* column = at.scores + v * W;
    vf top = splat(-__builtin_inff()), total{};
    if (bias)
      for (int64_t j = 0; j < length; ++j) {
        const vf score = load(column + j * kColumns) * scale + load(bias + v * W - j);
        store(column + j * kColumns, score);
        top = max(score, top);
      }
    else
      for (int64_t j = 0; j < length; ++j) top = max(load(column + j * kColumns), top);
    const float factor = (bias ? 1.f : scale) * 1.44269504f;
    const vf shift = top * factor;
    const auto weight = [&](int64_t j) LAMBDA {
      const vf w = j < length ? exp2_coarse(load(column + j * kColumns) * factor - shift) : vf{};
      total += w;
      return w;
    };
    for (int64_t j = 0; j < at.ldv; j += 2) {
      const vf low = weight(j);
      store_pairs(at.p + j * kColumns + 2 * v * W, low, weight(j + 1));
    }
    inverse[v] = 1.f / total;
  }
  each_tile<bf16>(K, [&](int64_t k, int64_t rows) LAMBDA {
    panel_tile<NV>(rows, length, at.values + k * at.ldv, at.ldv, at.p, nullptr, 0, at.wide + k * kColumns, kColumns);
  });
  for (int64_t k = 0; k < K; ++k)
    for (int v = 0; v < NV; ++v) {
      float* sum = at.wide + k * kColumns + v * W;
      store(sum, load(sum) * inverse[v]);
    }
  float* result = at.scores;  // which are spent
  transpose(at.wide, kColumns, K, NV * W, result, at.ldk);
  for (int64_t i = 0; i < count; ++i)
    each_vector(K, [&](int64_t k, int n) LAMBDA { store(out + i * ldo + k, load(result + i * at.ldk + k, n), n); });
}

inline int64_t attend_pairs_scratch(int64_t length, int64_t K) {
  return PairScratch(length, K).size() + round_up(2 * length + kColumns, W);
}

// As `attend`.
template <class T>
INLINE void attend_pairs(const float* q, const float* k, const float* v, int64_t ld, int64_t length, int64_t K,
                         const float* rel_bias, int64_t max_offset, float* scratch, T* out, int64_t ldo) {
  const float* bias = rel_bias ? bias_by_offset(rel_bias, max_offset, length, &scratch) : nullptr;
  PairScratch at(length, K);
  at.place(scratch);
  for (int64_t j = 0; j < length; ++j)
    for (int64_t i = 0; i < at.ldk; i += W) {
      const int64_t left = K - i;
      store(at.keys + j * at.ldk + i, left >= W ? load(k + j * ld + i) : left > 0 ? first(load(k + j * ld + i), left) : vf{});
    }
  for (int64_t j = 0; j < length; j += kColumns) {
    transpose(v + j * ld, ld, length - j < kColumns ? length - j : kColumns, K, at.wide, kColumns);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t c = 0; c < kColumns; c += W) store(at.values + i * at.ldv + j + c, load(at.wide + i * kColumns + c));
  }
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(K));
  for (int64_t i = 0; i < length; i += kColumns) {
    const int64_t count = length - i < kColumns ? length - i : kColumns;
    const float* here = bias ? bias + i : nullptr;
    if (count > W)
      attend_pairs_block<2>(q + i * ld, ld, count, length, K, scale, here, at, out + i * ldo, ldo);
    else
      attend_pairs_block<1>(q + i * ld, ld, count, length, K, scale, here, at, out + i * ldo, ldo);
  }
}

#else
constexpr int64_t attend_pairs_scratch(int64_t length, int64_t K) { return attend_scratch(length, K); }

template <class T>
INLINE void attend_pairs(const float* q, const float* k, const float* v, int64_t ld, int64_t length, int64_t K,
                         const float* rel_bias, int64_t max_offset, float* scratch, T* out, int64_t ldo) {
  attend(q, k, v, ld, length, K, rel_bias, max_offset, scratch, out, ldo);
}
#endif

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
