// The kernels of one instruction set.
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {

template <class T>
Kernels<T> table() {
  Kernels<T> all{};
  add_gelu(all);
  add_layer_norm_kernels(all);
  add_embed(all);
  add_attention(all);
  add_attention_pairs(all);
  add_pool(all);
  add_l2_normalize(all);
  add_cross_entropy(all);
  add_int8_linear(all);
  return all;
}

template Kernels<float> table();
template Kernels<bf16> table();

}  // namespace fastbert::FASTBERT_ISA
