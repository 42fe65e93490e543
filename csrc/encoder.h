// The frozen encoder: what a whole forward pass reads. Plain pointers, shared by the driver and every instruction set.
//
// Weights lie in panels: kernels.h's `panel_columns` output columns side by side, for each block of kDepth inputs, in the
// order in which the GEMM walks them.
#pragma once
#include <cstdint>

namespace fastbert {

enum class Activation { gelu, gelu_tanh, relu, silu, identity };

// Inputs that one sum runs over before it is added to the result: short sums round less, and a block of A stays in L1.
constexpr std::int64_t kDepth = 384;

// y = x W^T + bias; `out` is a multiple of panel_columns, with zero weights past the real columns.
template <class T>
struct Linear {
  const T* panels;
  const float* bias;
  std::int64_t in, out;
};

struct Norm {
  const float *weight, *bias;
  float eps;
};

// The columns of `qkv` go by groups of heads: queries of a group, its keys, its values, each padded to whole panels.
template <class T>
struct EncoderLayer {
  Linear<T> qkv, dense, intermediate, output;
  Norm attention_norm, output_norm;
};

// E embedding size, D hidden size, H heads (`group` of them side by side in `qkv`), K head size, F feed-forward size.
// `project` (E to D) has null panels where E is D; token_type and rel_bias (H, 2 max_offset + 1) may be null. `layers`
// may name a layer several times.
template <class T>
struct EncoderWeights {
  std::int64_t E, D, H, K, F, group, num_layers, max_offset;
  Activation activation;
  const T *word, *position, *token_type;
  Norm embed_norm;
  Linear<T> project;
  const EncoderLayer<T>* const* layers;
  const float* rel_bias;
};

// Sequences [first, last) of a packed batch; type_ids may be null.
struct Tokens {
  const std::int64_t *input_ids, *position_ids, *type_ids;
  const std::int32_t* cu_seqlens;
  std::int64_t first, last;
};

// The tasks of one stage of a pass: how many were taken, how many are done. A cache line each.
struct alignas(64) Stage {
  std::int32_t taken, done;
};

// Who computes a pass: one worker, or several that take tasks from common stages, which start as zeros. A stage ends
// when its tasks are done, not when all workers have come: one that the system runs late holds up nobody.
struct Team {
  Stage* stages;
  int worker, workers;
};

// encoder.cpp: to be called again and again by a worker with nothing to do.
void relax(int turn);

}  // namespace fastbert
