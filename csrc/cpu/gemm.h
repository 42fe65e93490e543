// The one tile of all matrix products of the encoder: C = add + A B, A by broadcasts, B in rows of NV vectors.
//
// A sum runs along the depth in order whatever the tile's height, so neither batch nor threads change a bit.
#pragma once
#include "cpu/amx.h"

namespace fastbert::FASTBERT_ISA {
namespace {

constexpr int kTileRows = W == 16 ? 14 : 6;  // 28 of 32 registers, or 12 of 16, hold sums
constexpr int kColumns = 2 * W;              // of a panel of weights

// Rows of A that one tile takes, by the type of its operands.
template <class T>
constexpr int kRows = kTileRows;
#if defined(FASTBERT_AMX)
template <>
constexpr int kRows<bf16> = 2 * kTileHeight;
template <>
constexpr int kRows<std::int8_t> = 2 * kTileHeight;
template <>
constexpr int kRows<split> = 2 * kTileHeight;
#endif

// Whether other work can be done while a tile multiplies.
template <class T>
constexpr bool kBeside = false;
#if defined(FASTBERT_AMX)
template <>
constexpr bool kBeside<bf16> = true;
#endif

// The depth of a panel is a multiple of this, filled with zeros; rows of A are read as far. Rows past the last are read
// too, and make sums that nobody takes.
template <class T>
constexpr int64_t kDepthStep = 1;

// Weights are asked for so many bytes before their turn: with few rows of A a panel is used up faster than it comes.
constexpr int64_t kAhead = 8192;
INLINE void ask_ahead(const void* weights) { __builtin_prefetch(static_cast<const char*>(weights) + kAhead); }

// C[0..MR) x [0..NV * W): A is (MR, depth), stored transposed if kTransposed; add has rows ld_add apart, or is null.
template <int MR, int NV, bool kTransposed, class T>
__attribute__((noinline)) void tile(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, const float* add,
                                    int64_t ld_add, float* c, int64_t ldc) {
  vf sums[MR][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vf row[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      row[v] = load(b + k * ldb + v * W);
      ask_ahead(b + k * ldb + v * W);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const vf x = splat(get(kTransposed ? a[m + k * lda] : a[m * lda + k]));
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sums[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      if (add) sums[m][v] += load(add + m * ld_add + v * W);
      store(c + m * ldc + v * W, sums[m][v]);
    }
}

#if defined(__AVX512BF16__)
// Pairs of the depth lie side by side in B, so that one instruction multiplies both; an odd last one has a zero partner.
constexpr bool kPairs = true;
#if defined(FASTBERT_AMX)
template <>
constexpr int64_t kDepthStep<bf16> = kTileBytes / sizeof(bf16);
template <>
constexpr int64_t kDepthStep<split> = kDepthStep<bf16>;
#else
template <>
constexpr int64_t kDepthStep<bf16> = 2;
#endif

INLINE __m512i pair_at(const bf16* a, bool both) {
  uint32_t bits = a->bits;
  if (both) memcpy(&bits, a, sizeof bits);
  return _mm512_set1_epi32(static_cast<int>(bits));
}

template <int MR, int NV>
__attribute__((noinline)) void pair_tile(int64_t depth, const bf16* a, int64_t lda, const bf16* b, const float* add,
                                         int64_t ld_add, float* c, int64_t ldc) {
  __m512 sums[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) sums[m][v] = _mm512_setzero_ps();
  const auto step = [&](int64_t k, bool both) LAMBDA {
    __m512bh row[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      row[v] = (__m512bh)_mm512_loadu_si512(b + k * kColumns + v * 2 * W);
      ask_ahead(b + k * kColumns + v * 2 * W);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const __m512bh x = (__m512bh)pair_at(a + m * lda + k, both);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], x, row[v]);
    }
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2) step(k, true);
  if (k < depth) step(k, false);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      store(c + m * ldc + v * W, (vf)sums[m][v] + (add ? load(add + m * ld_add + v * W) : vf{}));
}
#else
constexpr bool kPairs = false;
#endif

// The tile of exactly `rows` rows, at most MR.
template <int NV, bool kTransposed = false, int MR = kTileRows, class T>
INLINE void tile_of(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, const float* add,
                    int64_t ld_add, float* c, int64_t ldc) {
  if (rows == MR) return tile<MR, NV, kTransposed>(depth, a, lda, b, ldb, add, ld_add, c, ldc);
  if constexpr (MR > 1) tile_of<NV, kTransposed, MR - 1>(rows, depth, a, lda, b, ldb, add, ld_add, c, ldc);
}

// The tile of a panel of weights.
INLINE void panel_tile(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* panel, const float* add,
                       int64_t ld_add, float* c, int64_t ldc) {
  tile_of<2>(rows, depth, a, lda, panel, kColumns, add, ld_add, c, ldc);
}
#if defined(FASTBERT_AMX)
// Writes C in blocks of 16 rows, whole ones.
template <int NV = 2, class Beside>
INLINE void panel_tile(int64_t rows, int64_t depth, const bf16* a, int64_t lda, const bf16* panel, const float* add,
                       int64_t ld_add, float* c, int64_t ldc, Beside beside) {
  amx_products<NV, false>(rows, (depth + kDepthStep<bf16> - 1) / kDepthStep<bf16>, reinterpret_cast<const char*>(a),
                          lda * sizeof(bf16), reinterpret_cast<const char*>(panel), add, ld_add * sizeof(float), c,
                          ldc * sizeof(float), beside);
}
template <int NV = 2>
INLINE void panel_tile(int64_t rows, int64_t depth, const bf16* a, int64_t lda, const bf16* panel, const float* add,
                       int64_t ld_add, float* c, int64_t ldc) {
  panel_tile<NV>(rows, depth, a, lda, panel, add, ld_add, c, ldc, [](int64_t) LAMBDA {});
}
INLINE void panel_tile(int64_t rows, int64_t depth, const split* a, int64_t lda, const split* panel, const float* add,
                       int64_t ld_add, float* c, int64_t ldc) {
  alignas(64) float sums[2 * kTileHeight][kColumns];
  amx_split_products(rows, (depth + kDepthStep<split> - 1) / kDepthStep<split>, reinterpret_cast<const char*>(a),
                     lda * sizeof(split), reinterpret_cast<const char*>(panel), sums);
  for (int64_t m = 0; m < rows; ++m)
    for (int v = 0; v < kColumns; v += W) store(c + m * ldc + v, load(sums[m] + v) + load(add + m * ld_add + v));
}
#elif defined(__AVX512BF16__)
template <int NV = 2, int MR = kTileRows>
INLINE void panel_tile(int64_t rows, int64_t depth, const bf16* a, int64_t lda, const bf16* panel, const float* add,
                       int64_t ld_add, float* c, int64_t ldc) {
  if (rows == MR) return pair_tile<MR, NV>(depth, a, lda, panel, add, ld_add, c, ldc);
  if constexpr (MR > 1) panel_tile<NV, MR - 1>(rows, depth, a, lda, panel, add, ld_add, c, ldc);
}
#else
INLINE void panel_tile(int64_t rows, int64_t depth, const bf16* a, int64_t lda, const bf16* panel, const float* add,
                       int64_t ld_add, float* c, int64_t ldc) {
  tile_of<2>(rows, depth, a, lda, panel, kColumns, add, ld_add, c, ldc);
}
#endif

// f(first row, rows) over blocks of at most one tile of T, as equal as can be: a tile of few rows wastes cycles. Tiles of
// AMX write whole blocks of C, so theirs do not overlap.
template <class T, class F>
INLINE void each_tile(int64_t rows, F f) {
#if defined(FASTBERT_AMX)
  if constexpr (kRows<T> == 2 * kTileHeight) {
    for (int64_t r = 0; r < rows; r += kRows<T>) f(r, rows - r < kRows<T> ? rows - r : kRows<T>);
    return;
  }
#endif
  const int64_t count = (rows + kRows<T> - 1) / kRows<T>;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = rows * i / count;
    f(begin, rows * (i + 1) / count - begin);
  }
}

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
