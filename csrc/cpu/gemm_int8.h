// The tile of matrix products with 8-bit weights, and how activations become the integers that it takes.
//
// Rows of activations are cut into blocks of the depth, each with a scale of its own, max|x| / levels; a weight has the
// scale of its output channel. A row keeps max|x|, the levels are in the weights' scale. The sums of a block are exact,
// so neither batch, threads nor instruction set change them.
#pragma once
#include "cpu/gemm.h"

namespace fastbert::FASTBERT_ISA {
namespace {

using std::int16_t;
using std::int8_t;
using std::uint8_t;

typedef int8_t vb __attribute__((vector_size(W * 2)));
typedef int16_t vs __attribute__((vector_size(W * 4)));
typedef uint16_t vus __attribute__((vector_size(W * 4)));

// GCC loads the activations of all rows first and then has no register left for the sums; this keeps them in place.
#if defined(__AVX512F__)
#define PINNED(a, b) __asm__ volatile("" : "+v"(a), "+v"(b))
#elif defined(__AVX2__)
#define PINNED(a, b) __asm__ volatile("" : "+x"(a), "+x"(b))
#else
#define PINNED(a, b)
#endif

// sums + a0 b0 + a1 b1 of the two 16-bit values in each lane.
INLINE vi dot_pairs(vi sums, vi a, vi b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
  return sums + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return sums + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sums + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sums + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// sums + a0 b0 + ... + a3 b3 of the four bytes in each lane, a's unsigned and b's signed.
INLINE vi dot_fours(vi sums, vi a, vi b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
  const vi even = dot_pairs(sums, (vi)((vus)a & 0xff), (vi)((vs)((vus)b << 8) >> 8));
  return dot_pairs(even, (vi)((vus)a >> 8), (vi)((vs)b >> 8));
#endif
}

// Whether four 8-bit activations to an instruction are faster than two of 16 bits.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kFours = true;
#else
constexpr bool kFours = false;
#endif

// Activations of 16 bits: as good as exact, and sums of kDepth products fit 32 bits.
struct Pairs {
  using Value = int16_t;
  static constexpr int kGroup = 2, kLevels = 32767, kOffset = 0;
  static_assert(kDepth * 127 * kLevels <= 0x7fffffff);
  static INLINE vi dot(vi sums, vi a, vi b) { return dot_pairs(sums, a, b); }
  static INLINE vi weights(const int8_t* p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return (vi)__builtin_convertvector(bytes, vs);
#endif
  }
};

// Activations of 8 bits, from 1 to 255 with 128 for zero: a correction per column takes the 128 out again.
struct Fours {
  using Value = uint8_t;
  static constexpr int kGroup = 4, kLevels = 127, kOffset = 128;
  static INLINE vi dot(vi sums, vi a, vi b) { return dot_fours(sums, a, b); }
  static INLINE vi weights(const int8_t* p) {
    vi bytes;
    memcpy(&bytes, p, sizeof bytes);
    return bytes;
  }
};

#if defined(FASTBERT_AMX)
constexpr int64_t kIntStep = kTileBytes;
#else
constexpr int64_t kIntStep = 4;
#endif

// A panel of one depth block: its weights, those of a column side by side by groups, zeros up to whole steps; then
// a scale and a correction for each column.
constexpr int64_t int_panel_nbytes(int64_t depth) {
  return round_up(depth, kIntStep) * kColumns + kColumns * (sizeof(float) + sizeof(int32_t));
}

// rows[n] (null: zeros) and scales[n] are those of the panel's columns; k from `begin`.
template <class Form>
void pack_int_panel(const int8_t* const* rows, const float* scales, int64_t begin, int64_t depth, int8_t* panel) {
  constexpr int kGroup = Form::kGroup;
  memset(panel, 0, int_panel_nbytes(depth));
  float* scale = reinterpret_cast<float*>(panel + round_up(depth, kIntStep) * kColumns);
  int32_t* correction = reinterpret_cast<int32_t*>(scale + kColumns);
  for (int n = 0; n < kColumns; ++n) {
    if (rows[n] == nullptr) continue;
    scale[n] = scales[n] / Form::kLevels;
    for (int64_t k = 0; k < depth; ++k) {
      const int8_t weight = rows[n][begin + k];
      panel[k / kGroup * kGroup * kColumns + n * kGroup + k % kGroup] = weight;
      correction[n] += Form::kOffset * weight;
    }
  }
}

// max|scale x|. What is not finite makes it so, and with it whatever is multiplied by it.
INLINE float top_of(const float* x, const float* scale, int64_t n) {
  vf tops{}, nan{};
  each_vector(n, [&](int64_t i, int lanes) LAMBDA {
    const vf v = load(x + i, lanes) * load(scale + i, lanes);
    tops = max(max(v, -v), tops);
    nan = v == v ? nan : v;  // which the maximum does not take
  });
  return max(tops) + sum(nan);
}

// q = round(scale x / top * levels) + offset, at most kDepth of them; where top is below 1e-30 they count as zeros.
template <class Form>
INLINE void quantise(const float* x, const float* scale, int64_t n, float top, typename Form::Value* q) {
  typedef typename Form::Value vq __attribute__((vector_size(W * sizeof(typename Form::Value))));
  const float inverse = top > 1e-30f ? Form::kLevels / top : 0.f;
  each_vector(n, [&](int64_t i, int lanes) LAMBDA {
    // Adding 1.5 * 2^23 rounds to the nearest integer, halves to even, and leaves it in the low bits.
    const vf level = load(x + i, lanes) * load(scale + i, lanes) * inverse;
    const vu bits = as_bits(level + 12582912.f) + static_cast<uint32_t>(Form::kOffset);
    const vq narrow = __builtin_convertvector(bits, vq);
    memcpy(q + i, &narrow, lanes * sizeof(typename Form::Value));
  });
}

// One row of a result from its sums: add + top of the row x scale of the column x the sums without their offset.
INLINE void int_row(const vi sums[2], int64_t depth, float top, const int8_t* panel, const float* add, float* c) {
  const float* scale = reinterpret_cast<const float*>(panel + round_up(depth, kIntStep) * kColumns);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    vi correction;
    memcpy(&correction, scale + kColumns + v * W, sizeof correction);
    const vf sum = __builtin_convertvector(sums[v] - correction, vf);
    store(c + v * W, sum * (load(scale + v * W) * top) + load(add + v * W));
  }
}

// C[0..MR) x [0..kColumns) = add + top of the row x scale of the column x the sums of one depth block.
template <class Form, int MR>
__attribute__((noinline)) void int_tile(int64_t depth, const char* a, int64_t lda, const float* tops, int64_t ldt,
                                        const int8_t* panel, const float* add, int64_t ld_add, float* c, int64_t ldc) {
  constexpr int kGroup = Form::kGroup;
  vi sums[MR][2];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) sums[m][0] = sums[m][1] = vi{};
  for (int64_t k = 0; k < depth; k += kGroup) {
    const vi left = Form::weights(panel + k * kColumns), right = Form::weights(panel + k * kColumns + W * kGroup);
    for (int byte = 0; byte < kGroup * kColumns; byte += 64) ask_ahead(panel + k * kColumns + byte);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      int32_t group;
      memcpy(&group, a + m * lda + k * sizeof(typename Form::Value), sizeof group);
      const vi x = group - vi{};
      sums[m][0] = Form::dot(sums[m][0], x, left);
      sums[m][1] = Form::dot(sums[m][1], x, right);
      PINNED(sums[m][0], sums[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) int_row(sums[m], depth, tops[m * ldt], panel, add + m * ld_add, c + m * ldc);
}

// The tile of exactly `rows` rows, at most MR.
template <class Form, int MR = kTileRows>
INLINE void int_tile_of(int64_t rows, int64_t depth, const char* a, int64_t lda, const float* tops, int64_t ldt,
                        const int8_t* panel, const float* add, int64_t ld_add, float* c, int64_t ldc) {
  if (rows == MR) return int_tile<Form, MR>(depth, a, lda, tops, ldt, panel, add, ld_add, c, ldc);
  if constexpr (MR > 1)
    int_tile_of<Form, MR - 1>(rows, depth, a, lda, tops, ldt, panel, add, ld_add, c, ldc);
}

// At most kRows<int8_t> rows.
template <class Form>
INLINE void int_panel_tile(int64_t rows, int64_t depth, const char* a, int64_t lda, const float* tops, int64_t ldt,
                           const int8_t* panel, const float* add, int64_t ld_add, float* c, int64_t ldc) {
#if defined(FASTBERT_AMX)
  if constexpr (Form::kGroup == 4) {
    alignas(64) vi sums[2 * kTileHeight][2];
    amx_products<2, true>(rows, round_up(depth, kIntStep) / kIntStep, a, lda, reinterpret_cast<const char*>(panel), nullptr,
                          0, sums, 2 * kTileBytes, [](int64_t) LAMBDA {});
    for (int64_t m = 0; m < rows; ++m) int_row(sums[m], depth, tops[m * ldt], panel, add + m * ld_add, c + m * ldc);
    return;
  }
#endif
  each_tile<float>(rows, [&](int64_t r, int64_t n) LAMBDA {
    int_tile_of<Form>(n, depth, a + r * lda, lda, tops + r * ldt, ldt, panel, add + r * ld_add, ld_add, c + r * ldc,
                      ldc);
  });
}

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
