// An encoder that owns its packed weights and its arenas, and plans how threads share a batch.
#pragma once
#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace fastbert {

// Bytes, aligned to a cache line and in huge pages where the system gives them.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t nbytes);
  char* get() const { return data_.get(); }
  std::size_t nbytes() const { return nbytes_; }

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> data_;
  std::size_t nbytes_ = 0;
};

// A parameter as Python holds it: (rows, columns) or (columns).
template <class T>
struct Matrix {
  const T* data = nullptr;
  std::int64_t rows = 0, columns = 0;
};

// 8-bit weights have a scale a row and one a column's input, and say how many leading rows meet activations of 8 bits;
// see Linear.
template <class T>
struct LinearSource {
  Matrix<Given<T>> weight;
  const Stored<T>* bias = nullptr;
  const float *scales = nullptr, *input_scale = nullptr;
  std::int64_t fours = 0;
};

template <class T>
struct NormSource {
  const T *weight = nullptr, *bias = nullptr;
  float eps = 0.f;
};

template <class T>
struct LayerSource {
  LinearSource<T> qkv, dense, intermediate, output;
  NormSource<Stored<T>> attention_norm, output_norm;
};

// Everything is copied but the tables of embeddings, which must outlive the encoder.
template <class T>
struct EncoderSource {
  Matrix<Stored<T>> word, position, token_type;
  NormSource<Stored<T>> embed_norm;
  LinearSource<T> project;
  std::vector<LayerSource<T>> layers;
  std::vector<std::int64_t> order;  // which layer comes when
  Matrix<float> rel_bias;
  std::int64_t num_heads = 0;
  Activation activation = Activation::gelu;
};

// How large a team may be, by how long passes take. OpenMP ends a pass when the last of its threads has come, and a
// stage waits for whoever took its last task: where other processes keep the cores busy, a text of 12 tokens takes 5 to
// 7 ms on two threads and 1.5 on one.
//
// Half a team takes at most twice the time of the fastest pass of as many tokens. What passes took beyond that, in such
// times, is summed up, never below 0 (a CUSUM test: E. S. Page, Continuous inspection schemes, Biometrika 1954); at
// kPatience teams are halved for kPasses passes.
class TeamSize {
 public:
  int of(int asked);                                         // threads for a pass
  void took(std::int64_t tokens, std::int64_t nanoseconds);  // and how long they took

 private:
  static constexpr double kPatience = 20, kMost = 6;  // kMost: of one pass, so that a single one proves nothing
  static constexpr int kPasses = 128;
  static constexpr std::int64_t kStep = 8, kSteps = 64;  // passes are compared by tokens / kStep; longer ones are not
  std::array<std::atomic<std::int64_t>, kSteps> fastest_{};  // ns
  std::atomic<double> lost_{0};
  std::atomic<int> halvings_{0}, passes_{0};
};

template <class T>
class Encoder {
 public:
  explicit Encoder(const EncoderSource<T>& source);

  // Hidden states (T, D) of a batch of S sequences. Several threads may call it at once.
  void forward(const Tokens& tokens, std::int64_t max_seqlen, Stored<T>* out, int num_threads);

  // The same pooled, to one of two arrays (S, D): as it is, or of length 1. Hidden states stay in an arena.
  void forward_pooled(const Tokens& tokens, std::int64_t max_seqlen, PoolMode mode, Stored<T>* out, float* unit,
                      int num_threads);

  std::int64_t hidden_size() const { return weights_.D; }
  std::int64_t nbytes() const { return static_cast<std::int64_t>(panels_.nbytes()); }

 private:
  Linear<T> pack(const LinearSource<T>& source, const std::vector<std::int64_t>& rows, std::int64_t period);
  Linear<T> pack(const LinearSource<T>& source);
  Norm copy(const NormSource<Stored<T>>& source, std::int64_t size);
  template <class V>
  float* copy(const V* values, const std::vector<std::int64_t>& rows);
  std::vector<std::int64_t> qkv_rows() const;
  // `finish` is called for each sequence whose hidden states are there, by the worker that has them at hand.
  template <class F>
  void pass(const Tokens& tokens, std::int64_t max_seqlen, Stored<T>* out, int num_threads, F finish);
  Memory borrow(std::size_t nbytes);
  void give_back(Memory memory);

  const EncoderKernels<T> kernels_;
  EncoderWeights<T> weights_{};
  std::vector<EncoderLayer<T>> layers_;
  std::vector<const EncoderLayer<T>*> order_;
  Memory panels_;
  std::size_t packed_ = 0;                  // bytes of panels_ in use
  std::deque<std::vector<float>> vectors_;  // biases, norms; never moved
  TeamSize team_size_;
  std::mutex mutex_;                        // of arenas_
  std::vector<Memory> arenas_;
};

}  // namespace fastbert
