// y = x / max(|x|, 1e-12), row by row; what is not a number stays in its row.
#include "cpu/table.h"
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

template <class T>
void l2_normalize_fwd(const T* x, float* y, int64_t S, int64_t D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (S * D > kParallelWork)
  for (int64_t s = 0; s < S; ++s) {
    const T* from = x + s * D;
    vf squares{};
    each_vector(D, [&](int64_t i, int n) LAMBDA {
      const vf v = load(from + i, n);
      squares += v * v;
    });
    const float norm = __builtin_sqrtf(sum(squares)), divisor = norm < 1e-12f ? 1e-12f : norm;
    each_vector(D, [&](int64_t i, int n) LAMBDA { store(y + s * D + i, load(from + i, n) / divisor, n); });
  }
}

}  // namespace

template <class T>
void add_l2_normalize(Kernels<T>& table) {
  table.l2_normalize_fwd = l2_normalize_fwd;
}
template void add_l2_normalize(Kernels<float>&);
template void add_l2_normalize(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
