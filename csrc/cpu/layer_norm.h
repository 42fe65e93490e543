// One row of a layer normalisation, forward and backward: what add_layer_norm and embed share.
#pragma once
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

struct RowStats {
  float mean, rstd;
};

// Two passes over a row that lies in L1: the variance is a sum of squares of differences, never a difference of sums.
INLINE RowStats row_stats(const float* z, int64_t D, float eps) {
  vf total{};
  each_vector(D, [&](int64_t i, int n) LAMBDA { total += load(z + i, n); });
  const float mean = quick_sum(total) / static_cast<float>(D);
  vf squares{};
  each_vector(D, [&](int64_t i, int n) LAMBDA {
    const vf d = load(z + i, n) - mean;
    squares += n == W ? d * d : first(d * d, n);
  });
  return {mean, 1.f / __builtin_sqrtf(quick_sum(squares) / static_cast<float>(D) + eps)};
}

INLINE vf normalised(vf z, RowStats stats) { return (z - stats.mean) * stats.rstd; }

// Backward of one row. xhat and g = dy * weight lie in scratch; write(i, dz, n) takes the gradient of the row.
// dweight += dy * xhat and dbias += dy happen in the caller's partial sums.
template <class Dy, class Z, class Write>
INLINE void row_bwd(int64_t D, RowStats stats, const float* weight, float* xhat, float* g, float* dweight, float* dbias,
                    Dy dy, Z z, Write write) {
  vf total{}, product{};
  each_vector(D, [&](int64_t i, int n) LAMBDA {
    const vf d = dy(i, n), x = normalised(z(i, n), stats), gi = d * load(weight + i, n);
    store(xhat + i, x, n);
    store(g + i, gi, n);
    store(dweight + i, load(dweight + i, n) + d * x, n);
    store(dbias + i, load(dbias + i, n) + d, n);
    total += gi;  // 0 in the lanes past D, as d is
    product += gi * x;
  });
  const float c1 = sum(total) / static_cast<float>(D), c2 = sum(product) / static_cast<float>(D);
  each_vector(D, [&](int64_t i, int n) LAMBDA {
    write(i, (load(g + i, n) - c1 - load(xhat + i, n) * c2) * stats.rstd, n);
  });
}

// Per-chunk partial sums of dweight, dbias and, where a linear layer's bias is added here, its gradient.
struct ParameterSums {
  int64_t D, stride;
  RowChunks chunks;
  Scratch partial;
  ParameterSums(int64_t rows, int64_t D_, int64_t num_sums = 2)
      : D(D_), stride(num_sums * D_), chunks(rows), partial(chunks.count * stride) {}
  float* dweight(int64_t chunk) { return partial.get() + chunk * stride; }
  float* dbias(int64_t chunk) { return dweight(chunk) + D; }
  float* dx_bias(int64_t chunk) { return dweight(chunk) + 2 * D; }
  void clear(int64_t chunk) { memset(dweight(chunk), 0, stride * sizeof(float)); }
  void finish(float* dweight_, float* dbias_, float* dx_bias_ = nullptr) {
    add_chunks(dweight(0), chunks.count, stride, dweight_, D);
    add_chunks(dbias(0), chunks.count, stride, dbias_, D);
    if (dx_bias_) add_chunks(dx_bias(0), chunks.count, stride, dx_bias_, D);
  }
};

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
