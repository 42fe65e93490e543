// gelu(x + bias): one pass over memory, forward and backward; the bias gradient is summed in the same pass.
#include "cpu/gelu.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {
namespace {

template <class Form, class T>
void forward(const T* x, const float* bias, T* y, int64_t rows, int64_t F) {
#pragma omp parallel for schedule(static) if (rows * F > kParallelWork)
  for (int64_t row = 0; row < rows; ++row) {
    const T* in = x + row * F;
    T* out = y + row * F;
    each_vector(F, [&](int64_t i, int n) LAMBDA {
      const vf z = load(in + i, n) + (bias ? load(bias + i, n) : vf{});
      store(out + i, Form::value(z), n);
    });
  }
}

template <class Form, class T>
void backward(const T* dy, const T* x, const float* bias, T* dx, float* dbias, int64_t rows, int64_t F) {
  const RowChunks chunks(rows);
  const Scratch partial(chunks.count * F);
#pragma omp parallel for schedule(static) if (rows * F > kParallelWork)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    float* total = partial.get() + chunk * F;
    memset(total, 0, F * sizeof(float));
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const int64_t at = row * F;
      each_vector(F, [&](int64_t i, int n) LAMBDA {
        const vf z = load(x + at + i, n) + (bias ? load(bias + i, n) : vf{});
        const vf d = load(dy + at + i, n) * Form::slope(z);
        store(dx + at + i, d, n);
        if (bias) store(total + i, load(total + i, n) + d, n);
      });
    }
  }
  if (bias) add_chunks(partial.get(), chunks.count, F, dbias, F);
}

template <class T>
void gelu_fwd(const T* x, const float* bias, T* y, int64_t rows, int64_t F, bool tanh) {
  (tanh ? forward<Tanh, T> : forward<Erf, T>)(x, bias, y, rows, F);
}

template <class T>
void gelu_bwd(const T* dy, const T* x, const float* bias, T* dx, float* dbias, int64_t rows, int64_t F, bool tanh) {
  (tanh ? backward<Tanh, T> : backward<Erf, T>)(dy, x, bias, dx, dbias, rows, F);
}

}  // namespace

template <class T>
void add_gelu(Kernels<T>& table) {
  table.gelu_fwd = gelu_fwd;
  table.gelu_bwd = gelu_bwd;
}
template void add_gelu(Kernels<float>&);
template void add_gelu(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
