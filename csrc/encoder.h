// The frozen encoder: what a whole forward pass reads. Plain pointers, shared by the driver and every instruction set.
//
// Weights lie in panels: `panel_columns` output columns side by side, for each block of kDepth inputs, in the
// order in which the GEMM walks them.
#pragma once
#include <cstdint>

namespace fastbert {

// A float as two bf16, the nearest one and what is left, off by 2^-17 of it. Neighbours' highs and lows lie apart.
struct split {
  std::uint16_t halves[2];
};

// What an encoder with weights of type T stores its tables of embeddings and hidden states as, and packs weights from.
template <class T>
struct Storage {
  using type = T;
  using given = T;
};
template <>
struct Storage<std::int8_t> {
  using type = float;
  using given = std::int8_t;
};
template <>
struct Storage<split> {
  using type = float;
  using given = float;
};
template <class T>
using Stored = typename Storage<T>::type;
template <class T>
using Given = typename Storage<T>::given;

enum class Activation { gelu, gelu_tanh, relu, silu, identity };

// Inputs that one sum runs over before it is added to the result: short sums round less, and a block of A stays in L1.
constexpr std::int64_t kDepth = 384;

// y = x W^T + bias; `out` is a multiple of panel_columns, with zero weights past the real columns. Of 8-bit
// weights, the first `fours` of every `period` panels meet activations of 8 bits, four to a multiplication, the others
// activations of 16 bits, two to one; before they are rounded, inputs are multiplied by input_scale.
template <class T>
struct Linear {
  const T* panels;
  const float* bias;
  std::int64_t in, out, fours, period;
  const float* input_scale;
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
  const Stored<T> *word, *position, *token_type;
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

// The encoder's kernels of one instruction set, for weights of type T: float, bf16, int8_t or, where it has tiles, split.
template <class T>
struct EncoderKernels {
  // Fills the panels of a linear, panels_nbytes bytes: `rows` are those of the matrix (out, in), null for a row of
  // zeros. 8-bit weights have a scale a row, other weights a null pointer.
  std::int64_t panel_columns;
  std::int64_t (*panels_nbytes)(std::int64_t out, std::int64_t in);
  void (*pack_linear)(const Given<T>* const* rows, const float* scales, const Linear<T>& linear);

  // Hidden states of `tokens` to their rows of out (T, D). Each worker of a team calls it, with one memory of
  // encoder_bytes bytes, aligned to 64, for a pass over `rows` tokens at most, and with encoder_stages stages.
  std::int64_t (*encoder_bytes)(const EncoderWeights<T>& weights, std::int64_t rows, std::int64_t max_seqlen,
                                int workers);
  std::int64_t (*encoder_stages)(const EncoderWeights<T>& weights);
  void (*encoder_fwd)(const EncoderWeights<T>& weights, const Tokens& tokens, std::int64_t max_seqlen, Stored<T>* out,
                      char* memory, Team team);
};

// isa.cpp: those of the instruction set in use; whether it multiplies 8-bit activations faster than 16-bit ones, and
// whether it has split weights.
template <class T>
const EncoderKernels<T>& encoder_kernels();
bool has_fours();
bool has_split();

// encoder.cpp: to be called again and again by a worker with nothing to do.
void relax(int turn);

}  // namespace fastbert
