// y = LN(residual + dropout(x + x_bias)): each row is read once, kept in L1 for the statistics, and written once.
#include "cpu/layer_norm.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {
namespace {

template <class T>
INLINE vf biased(const T* x, const float* x_bias, int64_t at, int64_t i, int n) {
  return x_bias ? load(x + at + i, n) + load(x_bias + i, n) : load(x + at + i, n);
}

template <class T, class R>
void add_layer_norm_fwd(const T* x, const float* x_bias, const R* residual, const float* weight, const float* bias,
                        R* y, float* mean, float* rstd, int64_t rows, int64_t D, float eps, Dropout dropout) {
#pragma omp parallel if (rows * D > kParallelWork)
  {
    const Scratch z(D);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const RowDropout drop(dropout, row);
      const int64_t at = row * D;
      each_vector(D, [&](int64_t i, int n) LAMBDA {
        const vf kept = drop(biased(x, x_bias, at, i, n), i);
        store(z.get() + i, residual ? load(residual + at + i, n) + kept : kept, n);
      });
      const RowStats stats = row_stats(z.get(), D, eps);
      mean[row] = stats.mean;
      rstd[row] = stats.rstd;
      each_vector(D, [&](int64_t i, int n) LAMBDA {
        const vf value = normalised(load(z.get() + i, n), stats) * load(weight + i, n) + load(bias + i, n);
        store(y + at + i, value, n);
      });
    }
  }
}

template <class T, class R>
void add_layer_norm_bwd(const R* dy, const T* x, const float* x_bias, const R* residual, const float* weight,
                        const float* mean, const float* rstd, T* dx, float* dx_bias, R* dresidual, float* dweight,
                        float* dbias, int64_t rows, int64_t D, Dropout dropout) {
  ParameterSums sums(rows, D, x_bias ? 3 : 2);
#pragma omp parallel if (rows * D > kParallelWork)
  {
    const Scratch scratch(2 * D);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < sums.chunks.count; ++chunk) {
      sums.clear(chunk);
      for (int64_t row = sums.chunks.begin(chunk); row < sums.chunks.end(chunk); ++row) {
        const RowDropout drop(dropout, row);
        const int64_t at = row * D;
        float* dx_bias = sums.dx_bias(chunk);
        row_bwd(
            D, {mean[row], rstd[row]}, weight, scratch.get(), scratch.get() + D, sums.dweight(chunk),
            sums.dbias(chunk), [&](int64_t i, int n) LAMBDA { return load(dy + at + i, n); },
            [&](int64_t i, int n) LAMBDA {
              const vf kept = drop(biased(x, x_bias, at, i, n), i);
              return residual ? load(residual + at + i, n) + kept : kept;
            },
            [&](int64_t i, vf dz, int n) LAMBDA {
              if (dresidual) store(dresidual + at + i, dz, n);
              const vf kept = drop(dz, i);
              store(dx + at + i, kept, n);
              if (x_bias) store(dx_bias + i, load(dx_bias + i, n) + kept, n);
            });
      }
    }
  }
  sums.finish(dweight, dbias, dx_bias);
}

}  // namespace

template <class T>
void add_layer_norm_kernels(Kernels<T>& table) {
  table.add_layer_norm = {add_layer_norm_fwd<T, T>, add_layer_norm_bwd<T, T>};
  table.add_layer_norm_wide = {add_layer_norm_fwd<T, float>, add_layer_norm_bwd<T, float>};
}
template void add_layer_norm_kernels(Kernels<float>&);
template void add_layer_norm_kernels(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
