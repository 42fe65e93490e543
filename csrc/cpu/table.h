// Each op's file adds its kernels to the table of its instruction set; table.cpp collects them.
#pragma once
#include "kernels.h"

namespace fastbert::FASTBERT_ISA {

template <class T>
void add_gelu(Kernels<T>& table);
template <class T>
void add_layer_norm_kernels(Kernels<T>& table);
template <class T>
void add_embed(Kernels<T>& table);
template <class T>
void add_attention(Kernels<T>& table);
template <class T>
void add_attention_pairs(Kernels<T>& table);  // in place of some of these
template <class T>
void add_pool(Kernels<T>& table);
template <class T>
void add_l2_normalize(Kernels<T>& table);
template <class T>
void add_cross_entropy(Kernels<T>& table);
template <class T>
void add_int8_linear(Kernels<T>& table);

// encoder.cpp has a table of its own, for one more type of weights.
template <class T>
EncoderKernels<T> encoder_table();
bool offers_fours();

Peaks peak_table();

}  // namespace fastbert::FASTBERT_ISA
