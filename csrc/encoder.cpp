// Packs an encoder's weights, and splits a batch over threads: each its own sequences, or all of them each stage.
#include <omp.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "encoder_driver.h"

namespace fastbert {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;
// A thread's own sequences, at most this many tokens at once: their hidden states stay in L2.
constexpr std::int64_t kChunkTokens = 256;
// Tokens a thread below which threads share every stage instead, each reading its part of the weights only; and by how
// much the busiest thread's work may exceed the mean before sharing is faster again. Two Zen 5 threads, weights
// prefetched, MiniLM and BERT-base: apart takes 0.94 to 1.01 of the time of sharing from 48 tokens a thread on where
// chunks balance, 0.96 to 1.04 at a makespan of 1.05 to 1.07, 1.10 to 1.19 at one of 1.2 (2026-11-27).
constexpr std::int64_t kTogetherTokens = 64;
constexpr double kBalanced = 1.08;
// Tokens that a team takes at once.
constexpr std::int64_t kTeamTokens = 1024;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

float value(float x) { return x; }
float value(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

std::vector<std::int64_t> counted(std::int64_t size) {
  std::vector<std::int64_t> numbers(size);
  std::iota(numbers.begin(), numbers.end(), std::int64_t{0});
  return numbers;
}

struct Chunk {
  std::int64_t first, last;  // sequences
};

// Neighbouring sequences in chunks of about equal cost, at most max_tokens each unless a sequence is longer.
struct Chunks {
  std::vector<Chunk> list;
  std::int64_t max_tokens = 0;
  double total = 0, makespan = 0;  // of threads that take one chunk after the other

  template <class Cost>
  Chunks(const std::int32_t* cu_seqlens, std::int64_t S, int threads, std::int64_t limit, Cost cost) {
    for (std::int64_t s = 0; s < S; ++s) total += cost(cu_seqlens[s + 1] - cu_seqlens[s]);
    const std::int64_t tokens = cu_seqlens[S], rounds = (tokens + threads * limit - 1) / (threads * limit);
    const double target = total / static_cast<double>(threads * std::max<std::int64_t>(rounds, 1));
    std::vector<double> busy(threads, 0.0);
    for (std::int64_t s = 0; s < S;) {
      const std::int64_t first = s;
      double sum = 0;
      for (; s < S; ++s) {
        const double one = cost(cu_seqlens[s + 1] - cu_seqlens[s]);
        const bool over = sum + one / 2 > target || cu_seqlens[s + 1] - cu_seqlens[first] > limit;
        if (sum > 0 && over) break;
        sum += one;
      }
      list.push_back({first, s});
      max_tokens = std::max<std::int64_t>(max_tokens, cu_seqlens[s] - cu_seqlens[first]);
      *std::min_element(busy.begin(), busy.end()) += sum;
    }
    makespan = *std::max_element(busy.begin(), busy.end());
  }
};

std::int64_t now() {  // ns
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int TeamSize::of(int asked) {
  constexpr auto relaxed = std::memory_order_relaxed;  // threads that call at once may count a pass twice or not at all
  if (halvings_.load(relaxed) && passes_.fetch_add(1, relaxed) == kPasses) halvings_.store(0, relaxed);
  return std::max(1, asked >> halvings_.load(relaxed));
}

void TeamSize::took(std::int64_t tokens, std::int64_t nanoseconds) {
  constexpr auto relaxed = std::memory_order_relaxed;
  if (tokens / kStep >= kSteps) return;
  const int halvings = halvings_.load(relaxed);
  auto& fastest = fastest_[tokens / kStep];
  if (halvings == 0 && (fastest.load(relaxed) == 0 || nanoseconds < fastest.load(relaxed)))
    fastest.store(nanoseconds, relaxed);
  const auto half = static_cast<double>(fastest.load(relaxed) << (halvings + 1));  // what half of this team takes at most
  if (half == 0) return;
  const double late = 2 * (static_cast<double>(nanoseconds) / half - 1);
  const double lost = std::max(0.0, lost_.load(relaxed) + std::min(late, kMost));
  lost_.store(lost < kPatience ? lost : 0, relaxed);
  if (lost < kPatience) return;
  halvings_.fetch_add(1, relaxed);
  passes_.store(0, relaxed);
}

void relax(int turn) {
  constexpr int kSpins = 1 << 12;  // some 40 us: more than a stage's last task takes, less than a time slice
  if (turn % kSpins == kSpins - 1) sched_yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

Memory::Memory(std::size_t nbytes) : nbytes_(nbytes) {
  const std::size_t alignment = nbytes < kHugePage ? 64 : kHugePage;
  const std::size_t size = (nbytes + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<char*>(std::aligned_alloc(alignment, std::max(size, alignment))));
  if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(data_.get(), size, MADV_HUGEPAGE);  // advice: its refusal changes nothing
#endif
}

void Memory::Free::operator()(char* p) const { std::free(p); }

template <class T>
Encoder<T>::Encoder(const EncoderSource<T>& source) : kernels_(encoder_kernels<T>()) {
  const std::int64_t N = kernels_.panel_columns;
  EncoderWeights<T>& w = weights_;
  w.E = source.word.columns;
  w.D = source.layers.front().qkv.weight.columns;
  w.H = source.num_heads;
  w.K = w.D / w.H;
  w.F = source.layers.front().intermediate.weight.rows;
  w.group = std::min(w.H, std::max<std::int64_t>(1, N / w.K));
  w.activation = source.activation;
  w.word = source.word.data;
  w.position = source.position.data;
  w.token_type = source.token_type.data;

  const auto size = [&](std::int64_t out, std::int64_t in) { return kernels_.panels_nbytes(round_up(out, N), in); };
  const auto qkv = qkv_rows();
  const auto rows = static_cast<std::int64_t>(qkv.size());
  const std::int64_t layer = size(rows, w.D) + size(w.D, w.D) + size(w.F, w.D) + size(w.D, w.F);
  const std::int64_t project = source.project.weight.data ? size(w.D, w.E) : 0;
  panels_ = Memory(project + layer * source.layers.size());

  w.embed_norm = copy(source.embed_norm, w.E);
  if (project) w.project = pack(source.project);
  const std::int64_t period = 3 * round_up(w.group * w.K, N) / N;  // panels of a group of heads
  for (const LayerSource<T>& l : source.layers)
    layers_.push_back({pack(l.qkv, qkv, period), pack(l.dense), pack(l.intermediate), pack(l.output),
                       copy(l.attention_norm, w.D), copy(l.output_norm, w.D)});
  for (const std::int64_t index : source.order) order_.push_back(&layers_[index]);
  w.layers = order_.data();
  w.num_layers = static_cast<std::int64_t>(order_.size());
  if (const Matrix<float>& bias = source.rel_bias; bias.data) {
    vectors_.emplace_back(bias.data, bias.data + bias.rows * bias.columns);
    w.rel_bias = vectors_.back().data();
    w.max_offset = bias.columns / 2;
  }
}

// Rows of the matrix (3 D, D) in the order of EncoderLayer::qkv; -1 is a row of zeros.
template <class T>
std::vector<std::int64_t> Encoder<T>::qkv_rows() const {
  const EncoderWeights<T>& w = weights_;
  const std::int64_t padded = round_up(w.group * w.K, kernels_.panel_columns);
  std::vector<std::int64_t> rows;
  for (std::int64_t head = 0; head < w.H; head += w.group)
    for (int part = 0; part < 3; ++part)
      for (std::int64_t i = 0; i < padded; ++i) {
        const bool real = i < w.group * w.K && head * w.K + i < w.D;
        rows.push_back(real ? part * w.D + head * w.K + i : -1);
      }
  return rows;
}

template <class T>
template <class V>
float* Encoder<T>::copy(const V* values, const std::vector<std::int64_t>& rows) {
  std::vector<float>& to = vectors_.emplace_back(rows.size(), 0.f);
  for (std::size_t i = 0; values && i < rows.size(); ++i)
    if (rows[i] >= 0) to[i] = value(values[rows[i]]);
  return to.data();
}

template <class T>
Norm Encoder<T>::copy(const NormSource<Stored<T>>& source, std::int64_t size) {
  const auto rows = counted(size);
  return {copy(source.weight, rows), copy(source.bias, rows), source.eps};
}

template <class T>
Linear<T> Encoder<T>::pack(const LinearSource<T>& source, const std::vector<std::int64_t>& rows, std::int64_t period) {
  const std::int64_t in = source.weight.columns, out = static_cast<std::int64_t>(rows.size());
  std::vector<const Given<T>*> pointers(out, nullptr);
  for (std::int64_t i = 0; i < out; ++i)
    if (rows[i] >= 0) pointers[i] = source.weight.data + rows[i] * in;
  const float* scales = source.scales ? copy(source.scales, rows) : nullptr;
  const float* input_scale = source.input_scale ? copy(source.input_scale, counted(in)) : nullptr;
  const Linear<T> linear{reinterpret_cast<T*>(panels_.get() + packed_), copy(source.bias, rows), in, out,
                         source.fours * period / source.weight.rows, period, input_scale};
  packed_ += kernels_.panels_nbytes(out, in);
  kernels_.pack_linear(pointers.data(), scales, linear);
  return linear;
}

template <class T>
Linear<T> Encoder<T>::pack(const LinearSource<T>& source) {
  std::vector<std::int64_t> rows(round_up(source.weight.rows, kernels_.panel_columns), -1);
  std::iota(rows.begin(), rows.begin() + source.weight.rows, std::int64_t{0});
  return pack(source, rows, 1);
}

template <class T>
Memory Encoder<T>::borrow(std::size_t nbytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!arenas_.empty()) {
      Memory memory = std::move(arenas_.back());
      arenas_.pop_back();
      if (memory.nbytes() >= nbytes) return memory;
    }
  }
  return Memory(nbytes);
}

template <class T>
void Encoder<T>::give_back(Memory memory) {
  const std::lock_guard<std::mutex> lock(mutex_);
  arenas_.push_back(std::move(memory));
}

template <class T>
void Encoder<T>::forward(const Tokens& tokens, std::int64_t max_seqlen, Stored<T>* out, int num_threads) {
  pass(tokens, max_seqlen, out, num_threads, [](std::int64_t) {});
}

template <class T>
template <class F>
void Encoder<T>::pass(const Tokens& tokens, std::int64_t max_seqlen, Stored<T>* out, int num_threads, F finish) {
  const EncoderWeights<T>& w = weights_;
  const double per_token = static_cast<double>(4 * w.D * w.D + 2 * w.D * w.F), per_pair = 3.0 * w.D;
  const auto cost = [=](std::int64_t length) { return length * (per_token + per_pair * length); };
  const std::int64_t S = tokens.last, T_ = tokens.cu_seqlens[S];
  if (T_ == 0) {
    for (std::int64_t s = 0; s < S; ++s) finish(s);
    return;
  }

  Chunks apart(tokens.cu_seqlens, S, num_threads, kChunkTokens, cost);
  const bool enough = T_ >= kTogetherTokens * num_threads && apart.makespan * num_threads <= kBalanced * apart.total;
  const int workers = enough || num_threads == 1 ? 1 : team_size_.of(num_threads);
  if (workers == 1) {
    const int threads = enough ? num_threads : 1;
    if (threads < num_threads) apart = Chunks(tokens.cu_seqlens, S, 1, kChunkTokens, cost);
    const auto nbytes = round_up(kernels_.encoder_bytes(w, apart.max_tokens, max_seqlen, 1), 64);
    Memory memory = borrow(nbytes * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (std::size_t i = 0; i < apart.list.size(); ++i) {
      Tokens part = tokens;
      part.first = apart.list[i].first;
      part.last = apart.list[i].last;
      kernels_.encoder_fwd(w, part, max_seqlen, out, memory.get() + omp_get_thread_num() * nbytes, {nullptr, 0, 1});
      for (std::int64_t s = part.first; s < part.last; ++s) finish(s);
    }
    give_back(std::move(memory));
  } else {
    const Chunks together(tokens.cu_seqlens, S, 1, kTeamTokens, cost);
    const std::int64_t num_stages = kernels_.encoder_stages(w) + 1, num_chunks = together.list.size();
    const std::size_t stage_bytes = num_chunks * num_stages * sizeof(Stage);
    const std::size_t nbytes = kernels_.encoder_bytes(w, together.max_tokens, max_seqlen, workers);
    Memory memory = borrow(stage_bytes + nbytes);
    std::memset(memory.get(), 0, stage_bytes);
    const std::int64_t start = now();
#pragma omp parallel num_threads(workers)
    for (std::int64_t i = 0; i < num_chunks; ++i) {
      Tokens part = tokens;
      part.first = together.list[i].first;
      part.last = together.list[i].last;
      Stage* stages = reinterpret_cast<Stage*>(memory.get()) + i * num_stages;
      kernels_.encoder_fwd(w, part, max_seqlen, out, memory.get() + stage_bytes,
                           {stages, omp_get_thread_num(), omp_get_num_threads()});
      std::int32_t* taken = &stages[num_stages - 1].taken;
      for (std::int64_t s; (s = part.first + __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < part.last;) finish(s);
    }
    team_size_.took(T_, now() - start);
    give_back(std::move(memory));
  }
}

template <class T>
void Encoder<T>::forward_pooled(const Tokens& tokens, std::int64_t max_seqlen, PoolMode mode, Stored<T>* out,
                                float* unit, int num_threads) {
  const std::int64_t S = tokens.last, D = weights_.D;
  const std::int64_t hidden_bytes = round_up(tokens.cu_seqlens[S] * D * sizeof(Stored<T>), 64);
  const std::int64_t place_bytes = mode == PoolMode::max ? round_up(S * D * sizeof(std::int32_t), 64) : 0;
  Memory memory = borrow(hidden_bytes + place_bytes + (unit ? S * D * sizeof(Stored<T>) : 0));
  auto* hidden = reinterpret_cast<Stored<T>*>(memory.get());
  auto* argmax = place_bytes ? reinterpret_cast<std::int32_t*>(memory.get() + hidden_bytes) : nullptr;
  if (unit) out = reinterpret_cast<Stored<T>*>(memory.get() + hidden_bytes + place_bytes);
  const Kernels<Stored<T>>& k = kernels<Stored<T>>();
  pass(tokens, max_seqlen, hidden, num_threads, [&](std::int64_t s) {
    k.pool_fwd(hidden, tokens.cu_seqlens + s, out + s * D, argmax ? argmax + s * D : nullptr, 1, D, mode, 1);
    if (unit) k.l2_normalize_fwd(out + s * D, unit + s * D, 1, D, 1);
  });
  give_back(std::move(memory));
}

template class Encoder<float>;
template class Encoder<bf16>;
template class Encoder<std::int8_t>;
template class Encoder<split>;

}  // namespace fastbert
