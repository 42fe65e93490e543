// What both files of attention share: tasks, the keys that a block of queries sees, and biases by offset.
#pragma once
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// Where one (sequence, head) lies, and its padded sizes.
struct Task {
  int64_t begin, length, head, rows, columns;  // rows: length, and columns: K, rounded up to W
  Task(int64_t task, const int32_t* cu_seqlens, int64_t H, int64_t K)
      : begin(cu_seqlens[task / H]),
        length(cu_seqlens[task / H + 1] - begin),
        head(task % H),
        rows(round_up(length, W)),
        columns(round_up(K, W)) {}
};

// The keys that queries [q, q + count) see, at most `half` away; `first` and `padded` are multiples of W.
struct Span {
  int64_t first, last, padded;
  Span(int64_t q, int64_t count, int64_t half, int64_t length)
      : first(half < q ? (q - half) / W * W : 0),
        last(half < length - q - count ? q + count + half : length),
        padded(round_up(last, W)) {}
  int64_t size() const { return last - first; }
  int64_t padded_size() const { return padded - first; }
};

// rel_bias (H, num_offsets), or none: its column of an offset j - i, the ends standing for all that is farther.
inline int64_t offset_column(int64_t offset, int64_t num_offsets) {
  const int64_t column = offset + num_offsets / 2;
  return column < 0 ? 0 : (column < num_offsets ? column : num_offsets - 1);
}

// rel_bias written out for every offset that padded scores can have; without one, zeros, so that the loops over scores
// need not ask. Farther than `half` it is -inf. Lines run along the keys of a query, or along the queries of a key.
class BiasLines {
 public:
  BiasLines(const float* rel_bias, int64_t num_offsets, int64_t H, int64_t max_seqlen, int64_t half, bool by_key = false)
      : center_(round_up(max_seqlen, W) + 2 * W),
        stride_(rel_bias ? 2 * center_ : 0),
        lines_((rel_bias ? H : 1) * 2 * center_) {
    float* line = lines_.get();
    for (int64_t head = 0; head < (rel_bias ? H : 1); ++head, line += stride_)
      for (int64_t place = -center_; place < center_; ++place) {
        const int64_t offset = by_key ? -place : place;
        const float bias = rel_bias ? rel_bias[head * num_offsets + offset_column(offset, num_offsets)] : 0.f;
        line[place + center_] = offset < -half || offset > half ? -__builtin_inff() : bias;
      }
  }
  // Where element j is the bias of key j for query i; by_key, of query j for key i.
  const float* row(int64_t head, int64_t i) const { return lines_.get() + head * stride_ + center_ - i; }

 private:
  int64_t center_, stride_;
  Scratch lines_;
};

// The gradient of rel_bias out of the sums of every task along its diagonals: that of offset o at o + length - 1 from
// (begin * H + head * length) * 2 on. They are added in order.
inline void add_diagonals(const float* sums, const int32_t* cu_seqlens, int64_t S, int64_t H, int64_t head,
                          int64_t num_offsets, float* drel_bias) {
  float* total = drel_bias + head * num_offsets;
  memset(total, 0, num_offsets * sizeof(float));
  for (int64_t s = 0; s < S; ++s) {
    const int64_t begin = cu_seqlens[s], length = cu_seqlens[s + 1] - begin;
    const float* of_task = sums + (begin * H + head * length) * 2;
    for (int64_t offset = 1 - length; offset < length; ++offset)
      total[offset_column(offset, num_offsets)] += of_task[offset + length - 1];
  }
}

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
