// Every native kernel: plain pointers and sizes. The table of contents of csrc/.
//
// Letters as in Python: T packed tokens, S sequences, D hidden size, H heads, K head size, V classes, M rows.
// All arrays are contiguous. Arithmetic is fp32 whatever the storage type, but for attention's products of bf16 where the
// CPU multiplies pairs of it faster; parameters of a norm and biases, and the gradients of parameters, are always fp32.
// A kernel's result does not depend on the number of threads.
#pragma once
#include <cstdint>
#include <vector>

#include "encoder.h"

namespace fastbert {

struct bf16 {
  std::uint16_t bits;
};

enum class PoolMode { cls, lasttoken, max, mean, mean_sqrt_len_tokens, weightedmean };

// threshold = int(p * 2^32), scale = 1 / (1 - p); threshold 0 is no dropout. The bits: fastbert/ops/dropout.py.
struct Dropout {
  std::uint32_t seed, threshold;
  float scale;
};

// The kernels of one instruction set for one storage type (float or bf16). Null pointers mark absent operands.
template <class T>
struct Kernels {
  // y = gelu(x + bias) over (rows, F); tanh selects the approximation.
  void (*gelu_fwd)(const T* x, const float* bias, T* y, std::int64_t rows, std::int64_t F, bool tanh);
  void (*gelu_bwd)(const T* dy, const T* x, const float* bias, T* dx, float* dbias, std::int64_t rows, std::int64_t F,
                   bool tanh);

  // y = LN(residual + dropout(x + x_bias)); mean and rstd (T). x_bias (D), residual and their gradients may be null.
  // Wide: residual and y are float, as under autocast.
  template <class R>
  struct AddLayerNorm {
    void (*fwd)(const T* x, const float* x_bias, const R* residual, const float* weight, const float* bias, R* y,
                float* mean, float* rstd, std::int64_t rows, std::int64_t D, float eps, Dropout dropout);
    void (*bwd)(const R* dy, const T* x, const float* x_bias, const R* residual, const float* weight,
                const float* mean, const float* rstd, T* dx, float* dx_bias, R* dresidual, float* dweight,
                float* dbias, std::int64_t rows, std::int64_t D, Dropout dropout);
  };
  AddLayerNorm<T> add_layer_norm;
  AddLayerNorm<float> add_layer_norm_wide;

  // y = dropout(LN(word[input_ids] + token_type[type_ids] + position[position_ids])). The tables' gradients are fp32,
  // zeroed by the caller; padding_idx < 0 is none.
  void (*embed_fwd)(const std::int64_t* input_ids, const std::int64_t* position_ids, const std::int64_t* type_ids,
                    const T* word, const T* position, const T* token_type, const float* weight, const float* bias,
                    T* y, float* mean, float* rstd, std::int64_t rows, std::int64_t D, float eps, Dropout dropout);
  void (*embed_bwd)(const T* dy, const std::int64_t* input_ids, const std::int64_t* position_ids,
                    const std::int64_t* type_ids, const T* word, const T* position, const T* token_type,
                    const float* weight, const float* mean, const float* rstd, float* dword, float* dposition,
                    float* dtoken_type, float* dweight, float* dbias, std::int64_t rows, std::int64_t D,
                    std::int64_t padding_idx, Dropout dropout);

  // qkv (T, 3, H, K) -> out (T, H, K), lse (T, H); softmax of scale * QK^T within each sequence. With rel_bias (H,
  // num_offsets) the score of query i and key j gains column j - i + num_offsets / 2, the nearest one where that is out.
  // Keys more than `half` away are not seen.
  void (*attention_fwd)(const T* qkv, const float* rel_bias, const std::int32_t* cu_seqlens, T* out, float* lse,
                        std::int64_t S, std::int64_t H, std::int64_t K, std::int64_t num_offsets,
                        std::int64_t max_seqlen, std::int64_t half, float scale, Dropout dropout);
  void (*attention_bwd)(const T* dout, const T* qkv, const float* rel_bias, const T* out, const float* lse,
                        const std::int32_t* cu_seqlens, T* dqkv, float* drel_bias, std::int64_t S, std::int64_t H,
                        std::int64_t K, std::int64_t num_offsets, std::int64_t max_seqlen, std::int64_t half,
                        float scale, Dropout dropout);

  // hidden (T, D) -> out (S, D); argmax (S, D) is the token of each maximum, -1 in an empty sequence (mode max only).
  void (*pool_fwd)(const T* hidden, const std::int32_t* cu_seqlens, T* out, std::int32_t* argmax, std::int64_t S,
                   std::int64_t D, PoolMode mode, int threads);
  void (*pool_bwd)(const T* dout, const std::int32_t* cu_seqlens, const std::int32_t* argmax, T* dhidden,
                   std::int64_t S, std::int64_t D, PoolMode mode);

  // y = x / max(|x|, 1e-12), row by row.
  void (*l2_normalize_fwd)(const T* x, float* y, std::int64_t S, std::int64_t D, int threads);

  // losses and lse (M) of logits (M, V); rows labelled ignore_index have loss 0 and gradient 0. scale is one float.
  void (*cross_entropy_fwd)(const T* logits, const std::int64_t* labels, float* losses, double* lse, std::int64_t M,
                            std::int64_t V, std::int64_t ignore_index);
  void (*cross_entropy_bwd)(const float* scale, const T* logits, const std::int64_t* labels, const double* lse,
                            T* dlogits, std::int64_t M, std::int64_t V, std::int64_t ignore_index);

  // Rows of x (rows, K) to q = round(x / scale), scale = max|x| / 127; and y = sums * scale * weight_scale + bias of
  // the integer sums (rows, N). bias may be null.
  void (*int8_linear_quantize)(const T* x, std::int8_t* q, float* scale, std::int64_t rows, std::int64_t K);
  void (*int8_linear_scale)(const std::int32_t* sums, const float* scale, const float* weight_scale,
                            const float* bias, T* y, std::int64_t rows, std::int64_t N);
};

// Rounds of the densest arithmetic of an instruction set on every OpenMP thread, by storage type: what they return is
// the operations done, a product and its sum being two. Over the time taken it is the roof.
struct Peaks {
  double (*of_float)(std::int64_t rounds);
  double (*of_bf16)(std::int64_t rounds);
  double (*of_int8)(std::int64_t rounds);
};

// isa.cpp: the kernels of the instruction set in use; the encoder's are in encoder.h. Names: portable, avx2, avxvnni,
// avx512, avx512vnni, avx512bf16, amx.
template <class T>
const Kernels<T>& kernels();
const Peaks& peaks();
const char* isa();
std::vector<const char*> supported_isas();
void set_isa(const char* name);  // throws std::invalid_argument: unknown here, or not offered by this CPU

// plan.cpp: packing plans, integers only.
struct MaskPlan {
  std::int64_t num_tokens, max_seqlen;
};
MaskPlan plan_mask_lengths(const bool* mask, std::int32_t* cu_seqlens, std::int64_t B, std::int64_t L);
void plan_mask_indices(const bool* mask, std::int64_t* indices, std::int64_t size);
std::vector<std::int64_t> plan_batches(const std::int64_t* lengths, std::int64_t* order, std::int64_t S,
                                       std::int64_t budget_tokens, std::int64_t max_sequences);

}  // namespace fastbert
