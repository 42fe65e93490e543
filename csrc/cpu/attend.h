// Attention of one head of one sequence inside the encoder: fp32, from rows of queries, keys and values.
#pragma once
#include "cpu/gemm.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// to[k * width + i] = from[i * ld + k] for i < count, zeros up to width. May read W - 1 floats past a row's end.
INLINE void transpose(const float* from, int64_t ld, int64_t count, int64_t K, float* to, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
#if defined(__AVX512F__)
    for (int64_t k = 0; k < K; k += W) {
      __m512 rows[W];
      for (int r = 0; r < W; ++r) rows[r] = i + r < count ? _mm512_loadu_ps(from + (i + r) * ld + k) : _mm512_setzero_ps();
      transpose(rows);
      for (int64_t r = 0; r < W && k + r < K; ++r) store(to + (k + r) * width + i, (vf)rows[r]);
    }
#else
    for (int64_t k = 0; k < K; ++k) {
      vf column{};
      for (int r = 0; r < W && i + r < count; ++r) column[r] = from[(i + r) * ld + k];
      store(to + k * width + i, column);
    }
#endif
  }
}

// Floats that `attend` needs.
constexpr int64_t attend_scratch(int64_t length, int64_t K) {
  return kColumns * (K + length + round_up(K, W)) + round_up(2 * length + kColumns, W);
}

// One head of one sequence, NV * W queries at a time. Scores lie (key, query): maximum and sum of a softmax need no
// steps across lanes. bias (2 max_offset + 1) or null.
template <int NV, class T>
INLINE void attend_block(const float* q, const float* k, const float* v, int64_t ld, int64_t count, int64_t length,
                         int64_t K, float scale, const float* bias, float* scratch, T* out, int64_t ldo) {
  constexpr int64_t width = NV * W;
  float* queries = scratch;
  float* scores = queries + K * width;
  float* result = scores + length * width;
  const int64_t columns = round_up(K, W);
  transpose(q, ld, count, K, queries, width);
  each_tile<float>(length, [&](int64_t j, int64_t rows) LAMBDA {
    tile_of<NV>(rows, K, k + j * ld, ld, queries, width, nullptr, 0, scores + j * width, width);
  });
  vf inverse[NV];
  for (int i = 0; i < NV; ++i) {
    float* column = scores + i * W;
    vf top = splat(-__builtin_inff()), total{};
    if (bias)
      for (int64_t j = 0; j < length; ++j) {
        const vf score = load(column + j * width) * scale + load(bias + i * W - j);
        store(column + j * width, score);
        top = max(score, top);
      }
    else
      for (int64_t j = 0; j < length; ++j) top = max(load(column + j * width), top);
    const float factor = bias ? 1.f : scale;
    for (int64_t j = 0; j < length; ++j) {
      const vf p = exp((load(column + j * width) - top) * factor);
      total += p;
      store(column + j * width, p);
    }
    inverse[i] = 1.f / total;
  }
  each_tile<float>(count, [&](int64_t i, int64_t rows) LAMBDA {
    int64_t d = 0;
    for (; d + 2 * W <= columns; d += 2 * W)
      tile_of<2, true>(rows, length, scores + i, width, v + d, ld, nullptr, 0, result + i * columns + d, columns);
    if (d < columns)
      tile_of<1, true>(rows, length, scores + i, width, v + d, ld, nullptr, 0, result + i * columns + d, columns);
  });
  for (int64_t i = 0; i < count; ++i) {
    const float factor = inverse[i / W][i % W];
    each_vector(K, [&](int64_t d, int n) LAMBDA {
      store(out + i * ldo + d, load(result + i * columns + d) * factor, n);
    });
  }
}

// bias[i - j] of query i and key j, in scratch, which moves past it: offsets in reverse, so that queries are neighbours.
INLINE const float* bias_by_offset(const float* rel_bias, int64_t max_offset, int64_t length, float** scratch) {
  float* all = *scratch;
  *scratch += round_up(2 * length + kColumns, W);
  for (int64_t t = 0; t < 2 * length + kColumns; ++t) {
    const int64_t offset = length - 1 - t;  // j - i
    const int64_t held = offset < -max_offset ? -max_offset : offset > max_offset ? max_offset : offset;
    all[t] = rel_bias[held + max_offset];
  }
  return all + length - 1;
}

template <class T>
INLINE void attend(const float* q, const float* k, const float* v, int64_t ld, int64_t length, int64_t K,
                   const float* rel_bias, int64_t max_offset, float* scratch, T* out, int64_t ldo) {
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(K));
  const float* bias = rel_bias ? bias_by_offset(rel_bias, max_offset, length, &scratch) : nullptr;
  for (int64_t i = 0; i < length; i += kColumns) {
    const int64_t count = length - i < kColumns ? length - i : kColumns;
    const float* here = bias ? bias + i : nullptr;
    if (count > W)
      attend_block<2>(q + i * ld, k, v, ld, count, length, K, scale, here, scratch, out + i * ldo, ldo);
    else
      attend_block<1>(q + i * ld, k, v, ld, count, length, K, scale, here, scratch, out + i * ldo, ldo);
  }
}

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
