// Linear layers of the encoder: weights in panels by depth blocks, rows of activations as a product reads them.
#pragma once
#include "cpu/gemm_int8.h"

namespace fastbert::FASTBERT_ISA {
namespace {

template <class T>
constexpr bool kIntegers = false;
template <>
constexpr bool kIntegers<int8_t> = true;
// Whether products read activations in a form of their own, which the stage before them makes of each row.
template <class T>
constexpr bool kPrepared = kIntegers<T>;
template <>
constexpr bool kPrepared<split> = true;

constexpr int64_t num_blocks(int64_t in) { return (in + kDepth - 1) / kDepth; }

// Inputs of depth block d.
constexpr int64_t depth_of(int64_t in, int64_t d) { return in - d * kDepth < kDepth ? in - d * kDepth : kDepth; }

// Bytes from row to row: whole cache lines, an odd number of them, so that equal columns share no set of L1.
constexpr int64_t stride_nbytes(int64_t nbytes) { return (round_up(nbytes, 64) / 64 | 1) * 64; }

// The same in elements.
template <class T>
constexpr int64_t stride(int64_t columns) {
  return stride_nbytes(round_up(columns, kColumns) * sizeof(T)) / sizeof(T);
}

template <class T>
constexpr int64_t panel_nbytes(int64_t depth) {
  return kIntegers<T> ? int_panel_nbytes(depth) : round_up(depth, kDepthStep<T>) * kColumns * static_cast<int64_t>(sizeof(T));
}

// All depth blocks of one panel of columns.
template <class T>
constexpr int64_t column_nbytes(int64_t in) {
  const int64_t last = num_blocks(in) - 1;
  return last * panel_nbytes<T>(kDepth) + panel_nbytes<T>(depth_of(in, last));
}

// Panel p of depth block d: the blocks of a panel one after the other, as a product walks them.
template <class T>
INLINE const T* panel_of(const Linear<T>& w, int64_t d, int64_t p) {
  const int64_t offset = p * column_nbytes<T>(w.in) + d * panel_nbytes<T>(kDepth);
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(w.panels) + offset);
}

template <class T>
int64_t panels_nbytes(int64_t out, int64_t in) {
  return out / kColumns * column_nbytes<T>(in);
}

template <class T>
void pack_panel(const Linear<T>&, int64_t, const T* const* rows, const float*, int64_t begin, int64_t depth, T* to) {
  memset(static_cast<void*>(to), 0, panel_nbytes<T>(depth));
  constexpr int kStep = kPairs && sizeof(T) == 2 ? 2 : 1;  // values of one column that lie side by side
  for (int n = 0; n < kColumns; ++n)
    for (int64_t k = 0; rows[n] && k < depth; ++k)
      to[k / kStep * kStep * kColumns + n * kStep + k % kStep] = rows[n][begin + k];
}

#if defined(FASTBERT_AMX)
// How many bf16 the lows of a step lie behind its highs: in a row of activations, times kColumns in a panel.
constexpr int64_t kLow = kDepthStep<split>;

void pack_panel(const Linear<split>&, int64_t, const float* const* rows, const float*, int64_t begin, int64_t depth,
                split* to) {
  memset(static_cast<void*>(to), 0, panel_nbytes<split>(depth));
  auto* halves = reinterpret_cast<bf16*>(to);
  for (int n = 0; n < kColumns; ++n)
    for (int64_t k = 0; rows[n] && k < depth; ++k) {
      bf16* at = halves + (k / kLow * 2 * kLow + k % kLow / 2 * 2) * kColumns + 2 * n + k % 2;
      const vf weight = splat(rows[n][begin + k]);
      const vh high = narrow(weight);
      at[0].bits = high[0];
      at[kLow * kColumns].bits = narrow(weight - widen(high))[0];
    }
}
#endif

// Whether panel p meets activations of 8 bits.
INLINE bool takes_fours(const Linear<int8_t>& w, int64_t p) { return p % w.period < w.fours; }

void pack_panel(const Linear<int8_t>& w, int64_t p, const int8_t* const* rows, const float* scales, int64_t begin,
                int64_t depth, int8_t* to) {
  (takes_fours(w, p) ? pack_int_panel<Fours> : pack_int_panel<Pairs>)(rows, scales, begin, depth, to);
}

template <class T>
void pack_linear(const Given<T>* const* rows, const float* scales, const Linear<T>& w) {
  const int64_t count = w.out / kColumns;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < num_blocks(w.in) * count; ++task) {
    const int64_t d = task / count, p = task % count, first = p * kColumns;
    pack_panel(w, p, rows + first, scales ? scales + first : nullptr, d * kDepth, depth_of(w.in, d),
               const_cast<T*>(panel_of(w, d, p)));
  }
}

// Rows of activations as a matrix product reads them.
template <class T>
struct Rows {
  const T* data;
  int64_t ld;
  INLINE Rows from(int64_t row) const { return {data + row * ld, ld}; }
};

// Integers, `ld` bytes from row to row, of 8 bits and from `pairs` bytes on of 16; and max|x| of each depth block.
template <>
struct Rows<int8_t> {
  const char* data;
  int64_t ld, pairs;
  const float* tops;
  int64_t ldt;
  INLINE Rows from(int64_t row) const { return {data + row * ld, ld, pairs, tops + row * ldt, ldt}; }
};

// Columns of panel p for `count` rows of A, which begin at depth block `first`: C = bias or C, + A W over [first, last).
template <class T>
INLINE void multiply(const Linear<T>& w, int64_t p, int64_t first, int64_t last, int64_t count, Rows<T> a, float* c,
                     int64_t ldc) {
  for (int64_t d = first; d < last; ++d)
    panel_tile(count, depth_of(w.in, d), a.data + (d - first) * kDepth, a.ld, panel_of(w, d, p),
               d ? c : w.bias + p * kColumns, d ? ldc : 0, c, ldc);
}

#if defined(FASTBERT_AMX)
// Tiles keep their sums over all depth blocks. beside(step) is done at each step of kDepthStep inputs.
template <class Beside>
INLINE void multiply(const Linear<bf16>& w, int64_t p, int64_t first, int64_t last, int64_t count, Rows<bf16> a,
                     float* c, int64_t ldc, Beside beside) {
  const int64_t end = last < num_blocks(w.in) ? last * kDepth : w.in;
  panel_tile(count, end - first * kDepth, a.data, a.ld, panel_of(w, first, p), first ? c : w.bias + p * kColumns,
             first ? ldc : 0, c, ldc, beside);
}
#endif

template <class Form>
INLINE void multiply_integers(const Linear<int8_t>& w, int64_t p, int64_t first, int64_t last, int64_t count,
                              Rows<int8_t> a, float* c, int64_t ldc) {
  const char* data = a.data + (Form::kGroup == 4 ? 0 : a.pairs);
  for (int64_t d = first; d < last; ++d)
    int_panel_tile<Form>(count, depth_of(w.in, d), data + (d - first) * kDepth * sizeof(typename Form::Value), a.ld,
                         a.tops + d - first, a.ldt, panel_of(w, d, p), d ? c : w.bias + p * kColumns, d ? ldc : 0, c,
                         ldc);
}

INLINE void multiply(const Linear<int8_t>& w, int64_t p, int64_t first, int64_t last, int64_t count, Rows<int8_t> a,
                     float* c, int64_t ldc) {
  if (takes_fours(w, p))
    multiply_integers<Fours>(w, p, first, last, count, a, c, ldc);
  else
    multiply_integers<Pairs>(w, p, first, last, count, a, c, ldc);
}

// Activations as products with weights of type T read them, where that is not as they are: `rows` rows of `width` values.
template <class T>
struct Operands {
  Operands() = default;
  Operands(int64_t, int64_t) {}
  int64_t nbytes() const { return 0; }
  void place(char*) {}
};

// Integers, of the widths that panels of the product ask for.
template <>
struct Operands<int8_t> {
  int64_t rows = 0, ld = 0, pairs = 0, ldt = 0;
  char* data = nullptr;
  float* tops = nullptr;

  Operands() = default;
  Operands(int64_t rows_, int64_t width)
      : rows(rows_), pairs(round_up(width, 64)), ldt(num_blocks(width)) {
    ld = stride_nbytes(pairs + round_up(width, 2) * static_cast<int64_t>(sizeof(int16_t)));
  }
  int64_t nbytes() const { return rows * ld + round_up(rows * ldt * sizeof(float), 64); }
  void place(char* memory) {
    data = memory;
    tops = reinterpret_cast<float*>(memory + rows * ld);
  }
  Rows<int8_t> all() const { return {data, ld, pairs, tops, ldt}; }

  // Row `row` from the inputs of w that begin at depth block `block`.
  void fill(const Linear<int8_t>& w, int64_t row, const float* x, int64_t width, int64_t block) const {
    char* to = data + row * ld;
    for (int64_t d = 0; d < num_blocks(width); ++d, x += kDepth) {
      const int64_t depth = depth_of(width, d), first = d * kDepth;
      const float* scale = w.input_scale + block * kDepth + first;
      const float top = top_of(x, scale, depth);
      tops[row * ldt + d] = top;
      if (w.fours > 0) quantise<Fours>(x, scale, depth, top, reinterpret_cast<uint8_t*>(to) + first);
      if (w.fours < w.period) quantise<Pairs>(x, scale, depth, top, reinterpret_cast<int16_t*>(to + pairs) + first);
    }
  }
};

#if defined(FASTBERT_AMX)
// Of each kLow values the highs, then the lows, and zeros past the row's end.
template <>
struct Operands<split> {
  int64_t rows = 0, ld = 0;
  split* data = nullptr;

  Operands() = default;
  Operands(int64_t rows_, int64_t width) : rows(rows_), ld(stride<split>(width)) {}
  int64_t nbytes() const { return rows * ld * sizeof(split); }
  void place(char* memory) { data = reinterpret_cast<split*>(memory); }
  Rows<split> all() const { return {data, ld}; }

  void fill(const Linear<split>&, int64_t row, const float* x, int64_t width, int64_t) const {
    auto* to = reinterpret_cast<bf16*>(data + row * ld);
    for (int64_t i = 0; i < round_up(width, kLow); i += W) {
      const int64_t left = width - i < 0 ? 0 : width - i < W ? width - i : W;
      const vf value = load(x + i, static_cast<int>(left));
      const vf high = widen(narrow(value));
      bf16* at = to + i / kLow * 2 * kLow + i % kLow;
      store(at, high);
      store(at + kLow, value - high);
    }
  }
};
#endif

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
