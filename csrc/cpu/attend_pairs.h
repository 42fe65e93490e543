// Attention of one head of one sequence inside the encoder, with products of bf16; softmax and all sums are fp32.
//
// Both products are the panel tile of gemm.h, of rows of queries: scores = Q K^T, out = P V. Only keys are transposed, two
// features at a time; values lie in panels by interleaving their rows.
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

// Queries at a time: whole tiles.
constexpr int kQueries = kColumns / kRows<bf16> * kRows<bf16>;

// What one head of a sequence needs: its keys and values in panels, and room for some queries.
struct PairScratch {
  int64_t ldk, ldv;
  bf16 *keys, *values, *queries, *p;
  float *scores, *result, *bias;

  PairScratch(int64_t length, int64_t K) : ldk(round_up(K, kColumns)), ldv(round_up(length, kColumns)) {}
  // In floats.
  int64_t size() const { return ldk * ldv + (ldk + ldv) * kQueries * 3 / 2 + 2 * ldv + kColumns; }
  void place(float* memory) {
    keys = reinterpret_cast<bf16*>(memory);
    values = keys + ldk * ldv;
    queries = values + ldk * ldv;
    p = queries + ldk * kQueries;
    scores = reinterpret_cast<float*>(p + ldv * kQueries);
    result = scores + ldv * kQueries;
    bias = result + ldk * kQueries;
  }
};

// The first n of W floats at p, for any n.
INLINE vf load_some(const float* p, int64_t n) { return n >= W ? load(p) : n > 0 ? first(load(p), static_cast<int>(n)) : vf{}; }

// The first n of 32 floats at p, as bf16.
INLINE __m512i narrow_row(const float* p, int64_t n) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)load_some(p + W, n - W), (__m512)load_some(p, n));
}

// C = A B of `columns` columns in panels of `depth` by 32: the last one may be half empty.
INLINE void multiply_panels(int64_t rows, int64_t depth, const bf16* a, int64_t lda, const bf16* panels,
                            int64_t panel_depth, int64_t columns, float* c, int64_t ldc) {
  each_tile<bf16>(rows, [&](int64_t r, int64_t n) LAMBDA {
    for (int64_t i = 0; i < columns; i += kColumns) {
      if (columns - i > W)
        panel_tile<2>(n, depth, a + r * lda, lda, panels + i * panel_depth, nullptr, 0, c + r * ldc + i, ldc);
      else
        panel_tile<1>(n, depth, a + r * lda, lda, panels + i * panel_depth, nullptr, 0, c + r * ldc + i, ldc);
    }
  });
}

// p = 2^(factor s - their maximum) of one row of scores, zeros past its end; what they sum up to.
INLINE float soften(float* s, int64_t length, int64_t padded, float scale, const float* bias, bf16* p) {
  vf top = splat(-__builtin_inff());
  for (int64_t j = 0; j < length; j += W) {
    vf score = load(s + j);
    if (bias) store(s + j, score = score * scale + load(bias + j));
    if (length - j < W) score = lanes() < splat(static_cast<uint32_t>(length - j)) ? score : top;
    top = max(score, top);
  }
  const float factor = (bias ? 1.f : scale) * 1.44269504f;
  const vf shift = splat(quick_max(top) * factor);
  vf total{};
  const auto weight = [&](int64_t j) LAMBDA {
    if (j >= length) return vf{};
    const vf w = exp2_coarse(load(s + j) * factor - shift);
    return length - j < W ? first(w, static_cast<int>(length - j)) : w;
  };
  for (int64_t j = 0; j < padded; j += 2 * W) {
    const vf low = weight(j), high = weight(j + W);
    total += low + high;
    _mm512_storeu_si512(p + j, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
  return quick_sum(total);
}

inline int64_t attend_pairs_scratch(int64_t length, int64_t K) { return PairScratch(length, K).size(); }

// As `attend`.
template <class T>
INLINE void attend_pairs(const float* q, const float* k, const float* v, int64_t ld, int64_t length, int64_t K,
                         const float* rel_bias, int64_t max_offset, float* scratch, T* out, int64_t ldo) {
  PairScratch at(length, K);
  at.place(scratch);
  if (rel_bias)  // of key - query from 1 - length on
    for (int64_t t = 0; t < 2 * at.ldv + kColumns; ++t) {
      const int64_t offset = t - (length - 1);
      at.bias[t] = rel_bias[(offset < -max_offset ? -max_offset : offset > max_offset ? max_offset : offset) + max_offset];
    }
  for (int64_t j = 0; j < length; j += W)
    for (int64_t i = 0; i < at.ldk; i += kColumns) {
      __m512 rows[W];
      for (int r = 0; r < W; ++r)
        rows[r] = j + r < length ? (__m512)narrow_row(k + (j + r) * ld + i, K - i) : _mm512_setzero_ps();
      transpose(rows);
      bf16* panel = at.keys + j / kColumns * kColumns * at.ldk + i * kColumns + 2 * (j % kColumns);
      for (int r = 0; r < W; ++r) _mm512_storeu_ps(panel + r * 2 * kColumns, rows[r]);
    }
  for (int64_t j = 0; j < at.ldv; j += 2)
    for (int64_t i = 0; i < at.ldk; i += W)
      store_pairs(at.values + i / kColumns * kColumns * at.ldv + j * kColumns + 2 * (i % kColumns),
                  j < length ? load_some(v + j * ld + i, K - i) : vf{},
                  j + 1 < length ? load_some(v + (j + 1) * ld + i, K - i) : vf{});
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(K));
  for (int64_t i = 0; i < length; i += kQueries) {
    const int64_t count = length - i < kQueries ? length - i : kQueries;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < at.ldk; c += kColumns)
        _mm512_storeu_si512(at.queries + r * at.ldk + c, narrow_row(q + (i + r) * ld + c, K - c));
    multiply_panels(count, K, at.queries, at.ldk, at.keys, at.ldk, length, at.scores, at.ldv);
    float totals[kQueries];
    for (int64_t r = 0; r < count; ++r) {
      const float* bias = rel_bias ? at.bias + length - 1 - (i + r) : nullptr;
      totals[r] = soften(at.scores + r * at.ldv, length, at.ldv, scale, bias, at.p + r * at.ldv);
    }
    multiply_panels(count, length, at.p, at.ldv, at.values, at.ldv, K, at.result, at.ldk);
    for (int64_t r = 0; r < count; ++r)
      each_vector(K, [&](int64_t c, int n) LAMBDA {
        store(out + (i + r) * ldo + c, load(at.result + r * at.ldk + c, n) * (1.f / totals[r]), n);
      });
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
