// What surrounds the integer product of an 8-bit linear layer: rows to 8 bits, and 32-bit sums back to floats. The
// product itself is torch's. Results are the reference's, bit for bit.
#include "cpu/table.h"
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

typedef std::int8_t vb __attribute__((vector_size(W)));

INLINE void store(std::int8_t* p, vf integers, int n) {
  // Adding 1.5 * 2^23 rounds to the nearest integer, halves to even, and leaves it in the low bits.
  const vb bytes = __builtin_convertvector(as_bits(integers + 12582912.f), vb);
  memcpy(p, &bytes, n);
}

template <class T>
void int8_linear_quantize(const T* x, std::int8_t* q, float* scale, int64_t rows, int64_t K) {
#pragma omp parallel for schedule(static) if (rows * K > kParallelWork)
  for (int64_t row = 0; row < rows; ++row) {
    const T* in = x + row * K;
    vf tops{}, nan{};
    each_vector(K, [&](int64_t k, int n) LAMBDA {
      const vf v = load(in + k, n);
      tops = max(max(v, -v), tops);
      nan = v == v ? nan : v;  // which the maximum does not take
    });
    const float step = (max(tops) + sum(nan)) / 127.f;
    const vf divisor = splat(step == 0.f ? 1.f : step);
    scale[row] = step;
    each_vector(K, [&](int64_t k, int n) LAMBDA { store(q + row * K + k, load(in + k, n) / divisor, n); });
  }
}

// x as rounded: in memory no compiler fuses the product that made it with the sum that takes it.
INLINE vf rounded(vf x) {
  __asm__("" : "+m"(x));
  return x;
}

template <class T>
void int8_linear_scale(const int32_t* sums, const float* scale, const float* weight_scale, const float* bias, T* y,
                       int64_t rows, int64_t N) {
#pragma omp parallel for schedule(static) if (rows * N > kParallelWork)
  for (int64_t row = 0; row < rows; ++row) {
    each_vector(N, [&](int64_t i, int n) LAMBDA {
      vi total{};
      memcpy(&total, sums + row * N + i, n * sizeof(int32_t));
      const vf product = __builtin_convertvector(total, vf) * scale[row] * load(weight_scale + i, n);
      store(y + row * N + i, bias ? rounded(product) + load(bias + i, n) : product, n);
    });
  }
}

}  // namespace

template <class T>
void add_int8_linear(Kernels<T>& table) {
  table.int8_linear_quantize = int8_linear_quantize;
  table.int8_linear_scale = int8_linear_scale;
}
template void add_int8_linear(Kernels<float>&);
template void add_int8_linear(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
