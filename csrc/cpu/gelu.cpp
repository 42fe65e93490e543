// gelu(x + bias): one pass over memory, forward and backward; the bias gradient is summed in the same pass.
#include "cpu/table.h"
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// gelu = z * cdf, gelu' = cdf + z * pdf, of the normal distribution.
struct Erf {
  // 0.5 + z R(z^2): a rational minimax fit on |z| < 5.5, off by 7e-9 (1.8e-7 with the rounding of floats); 0 or 1 past it.
  static INLINE vf cdf(vf z) {
    const vf u = z * z;
    vf p = u * 2.2749333083993406e-08f + 6.352130640152609e-06f;
    vf q = u * 1.1975039342360105e-06f + 7.36479414626956e-05f;
    p = p * u + 0.00016882698400877416f;
    q = q * u + 0.0018844523001462221f;
    p = p * u + 0.004677268676459789f;
    q = q * u + 0.028645943850278854f;
    p = p * u + 0.033852770924568176f;
    q = q * u + 0.2515222430229187f;
    p = p * u + 0.398942232131958f;
    q = q * u + 1.f;
    const vf inside = z * (p / q) + 0.5f;
    return z > 5.5f ? splat(1.f) : (z < -5.5f ? vf{} : inside);
  }
  static INLINE vf value(vf z) { return z * cdf(z); }
  static INLINE vf slope(vf z) { return cdf(z) + z * exp(-0.5f * (z * z)) * 0.3989422804f; }
};

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (z + 0.044715 z^3).
struct Tanh {
  static INLINE vf sigmoid(vf z) { return 1.f / (1.f + exp(z * (-1.5957691216f - 0.0713548163f * (z * z)))); }
  static INLINE vf value(vf z) { return z * sigmoid(z); }
  static INLINE vf slope(vf z) {
    const vf s = sigmoid(z);
    return s + z * (s * (1.f - s)) * (1.5957691216f + 0.2140644489f * (z * z));
  }
};

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
