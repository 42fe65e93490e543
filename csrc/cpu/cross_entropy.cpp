// loss = logsumexp(logits) - logits[label], row by row; backward computes the probabilities again from the saved lse.
// It is saved in double: at a logit of 200 the last bit of a float is 1.5e-5, and that would be the error of p.
#include "cpu/table.h"
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// Maximum, then sum of exponentials: two passes over a row that fits L2. Blocks are summed in float and added up in
// double: a vocabulary is long enough for a running float sum to lose digits.
template <class T>
double log_sum_exp(const T* x, int64_t V) {
  constexpr int64_t kBlock = 64 * W;
  vf tops = splat(-__builtin_inff());
  const int64_t whole = V / W * W;
  for (int64_t i = 0; i < whole; i += W) tops = max(load(x + i), tops);
  float top = max(tops);
  for (int64_t i = whole; i < V; ++i) top = get(x[i]) > top ? get(x[i]) : top;
  if (top == -__builtin_inff()) return __builtin_nan("");  // all -inf or all NaN: no distribution
  double total = 0.;
  for (int64_t start = 0; start < V; start += kBlock) {
    vf block{};
    each_vector(V - start < kBlock ? V - start : kBlock, [&](int64_t i, int n) LAMBDA {
      const vf e = exp(load(x + start + i, n) - top);
      block += n == W ? e : first(e, n);
    });
    total += sum(block);
  }
  return top + __builtin_log(total);
}

template <class T>
void cross_entropy_fwd(const T* logits, const int64_t* labels, float* losses, double* lse, int64_t M, int64_t V,
                       int64_t ignore_index) {
#pragma omp parallel for schedule(static) if (M * V > kParallelWork)
  for (int64_t row = 0; row < M; ++row) {
    const T* x = logits + row * V;
    lse[row] = log_sum_exp(x, V);
    losses[row] = labels[row] == ignore_index ? 0.f : static_cast<float>(lse[row] - get(x[labels[row]]));
  }
}

template <class T>
void cross_entropy_bwd(const float* scale, const T* logits, const int64_t* labels, const double* lse, T* dlogits,
                       int64_t M, int64_t V, int64_t ignore_index) {
#pragma omp parallel for schedule(static) if (M * V > kParallelWork)
  for (int64_t row = 0; row < M; ++row) {
    const T* x = logits + row * V;
    T* dx = dlogits + row * V;
    if (labels[row] == ignore_index) {
      memset(static_cast<void*>(dx), 0, V * sizeof(T));
      continue;
    }
    const float high = static_cast<float>(lse[row]), low = static_cast<float>(lse[row] - high);
    each_vector(V, [&](int64_t i, int n) LAMBDA { store(dx + i, exp(load(x + i, n) - high - low) * *scale, n); });
    // p - 1 = expm1(log p): no cancellation where the model is sure of the label.
    const double log_p = get(x[labels[row]]) - lse[row];
    store(dx + labels[row], splat(static_cast<float>(__builtin_expm1(log_p)) * *scale), 1);
  }
}

}  // namespace

template <class T>
void add_cross_entropy(Kernels<T>& table) {
  table.cross_entropy_fwd = cross_entropy_fwd;
  table.cross_entropy_bwd = cross_entropy_bwd;
}
template void add_cross_entropy(Kernels<float>&);
template void add_cross_entropy(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
