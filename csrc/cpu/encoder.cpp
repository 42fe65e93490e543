// A whole forward pass over some sequences of a packed batch, by one thread or by a team that shares every stage.
//
// A row goes through the same sums in the same order either way: neither the batch nor the threads change a bit.
#include "encoder.h"

#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/layer_norm.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// Rows that go through the feed-forward network together: what they need stays in L2 while the weights stream by.
constexpr int64_t kRows = 256;

struct Relu {
  static INLINE vf value(vf z) { return z > 0.f ? z : (z == z ? vf{} : z); }
};
struct Silu {
  static INLINE vf value(vf z) { return z / (1.f + exp(-z)); }
};
struct Identity {
  static INLINE vf value(vf z) { return z; }
};

// Elements from row to row: whole cache lines, an odd number of them, so that equal columns share no set of L1.
template <class T>
constexpr int64_t stride(int64_t columns) {
  return (round_up(round_up(columns, kColumns) * sizeof(T), 64) / 64 | 1) * 64 / sizeof(T);
}

// Panel p of depth block d: blocks one after the other, whole panels in each.
template <class T>
INLINE const T* panel_of(const Linear<T>& w, int64_t d, int64_t p) {
  const int64_t begin = d * kDepth, depth = w.in - begin < kDepth ? w.in - begin : kDepth;
  return w.panels + begin * w.out + p * round_up(depth, 2) * kColumns;
}

template <class T>
void pack_linear(const T* const* rows, int64_t out, int64_t in, T* panels) {
  const Linear<T> w{panels, nullptr, in, out};
  const int64_t count = out / kColumns;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < (in + kDepth - 1) / kDepth * count; ++task) {
    const int64_t begin = task / count * kDepth, end = in < begin + kDepth ? in : begin + kDepth;
    T* to = const_cast<T*>(panel_of(w, task / count, task % count));
    memset(to, 0, round_up(end - begin, 2) * kColumns * sizeof(T));
    constexpr int kStep = kPairs && sizeof(T) == 2 ? 2 : 1;  // values of one column that lie side by side
    for (int n = 0; n < kColumns; ++n) {
      const T* from = rows[task % count * kColumns + n];
      for (int64_t k = begin; from && k < end; ++k)
        to[(k - begin) / kStep * kStep * kColumns + n * kStep + (k - begin) % kStep] = from[k];
    }
  }
}

// Columns of panel p for `rows` rows of A, which begin at depth block `first`: C = bias or C, + A W over [first, last).
template <class T>
INLINE void multiply(const Linear<T>& w, int64_t p, int64_t first, int64_t last, int64_t rows, const T* a, int64_t lda,
                     float* c, int64_t ldc) {
  for (int64_t d = first; d < last; ++d) {
    const int64_t depth = w.in - d * kDepth < kDepth ? w.in - d * kDepth : kDepth;
    panel_tile(rows, depth, a + (d - first) * kDepth, lda, panel_of(w, d, p), d ? c : w.bias + p * kColumns,
               d ? ldc : 0, c, ldc);
  }
}

// to[k * width + i] = from[i * ld + k] for i < count, zeros up to width. May read W - 1 floats past a row's end.
INLINE void transpose(const float* from, int64_t ld, int64_t count, int64_t K, float* to, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
#if defined(__AVX512F__)
    for (int64_t k = 0; k < K; k += W) {
      __m512 rows[W], mixed[W];
      for (int r = 0; r < W; ++r) rows[r] = i + r < count ? _mm512_loadu_ps(from + (i + r) * ld + k) : _mm512_setzero_ps();
      const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
      // Interleaving the first half of the rows with the second, log2(W) times, transposes.
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
        for (int r = 0; r < W / 2; ++r) {
          mixed[2 * r] = _mm512_permutex2var_ps(rows[r], low, rows[r + W / 2]);
          mixed[2 * r + 1] = _mm512_permutex2var_ps(rows[r], high, rows[r + W / 2]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) rows[r] = mixed[r];
      }
      for (int64_t r = 0; r < W && k + r < K; ++r) store(to + (k + r) * width + i, (vf)rows[r]);
    }
#else
    for (int64_t k = 0; k < K; ++k) {
      vf column{};
      for (int r = 0; r < W && i + r < count; ++r) column[r] = from[(i + r) * ld + k];
      store(to + k * width + i, column);
    }
#endif
  }
}

// Floats that `attend` needs.
constexpr int64_t attend_scratch(int64_t length, int64_t K) {
  return kColumns * (K + length + round_up(K, W)) + 2 * length + kColumns;
}

// One head of one sequence, NV * W queries at a time. Scores lie (key, query): maximum and sum of a softmax need no
// steps across lanes. bias (2 max_offset + 1) or null.
template <int NV, class T>
INLINE void attend_block(const float* q, const float* k, const float* v, int64_t ld, int64_t count, int64_t length,
                         int64_t K, float scale, const float* bias, float* scratch, T* out, int64_t ldo) {
  constexpr int64_t width = NV * W;
  float* queries = scratch;
  float* scores = queries + K * width;
  float* result = scores + length * width;
  const int64_t columns = round_up(K, W);
  transpose(q, ld, count, K, queries, width);
  each_tile(length, [&](int64_t j, int64_t rows) LAMBDA {
    tile_of<NV>(rows, K, k + j * ld, ld, queries, width, nullptr, 0, scores + j * width, width);
  });
  vf inverse[NV];
  for (int i = 0; i < NV; ++i) {
    float* column = scores + i * W;
    vf top = splat(-__builtin_inff()), total{};
    if (bias)
      for (int64_t j = 0; j < length; ++j) {
        const vf score = load(column + j * width) * scale + load(bias + i * W - j);
        store(column + j * width, score);
        top = max(score, top);
      }
    else
      for (int64_t j = 0; j < length; ++j) top = max(load(column + j * width), top);
    const float factor = bias ? 1.f : scale;
    for (int64_t j = 0; j < length; ++j) {
      const vf p = exp((load(column + j * width) - top) * factor);
      total += p;
      store(column + j * width, p);
    }
    inverse[i] = 1.f / total;
  }
  each_tile(count, [&](int64_t i, int64_t rows) LAMBDA {
    int64_t d = 0;
    for (; d + 2 * W <= columns; d += 2 * W)
      tile_of<2, true>(rows, length, scores + i, width, v + d, ld, nullptr, 0, result + i * columns + d, columns);
    if (d < columns)
      tile_of<1, true>(rows, length, scores + i, width, v + d, ld, nullptr, 0, result + i * columns + d, columns);
  });
  for (int64_t i = 0; i < count; ++i) {
    const float factor = inverse[i / W][i % W];
    each_vector(K, [&](int64_t d, int n) LAMBDA {
      store(out + i * ldo + d, load(result + i * columns + d) * factor, n);
    });
  }
}

template <class T>
INLINE void attend(const float* q, const float* k, const float* v, int64_t ld, int64_t length, int64_t K,
                   const float* rel_bias, int64_t max_offset, float* scratch, T* out, int64_t ldo) {
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(K));
  float* bias = nullptr;
  if (rel_bias) {  // bias[i - j] of query i and key j: offsets in reverse, so that the lanes of queries are neighbours
    float* all = scratch;
    scratch += 2 * length + kColumns;
    for (int64_t t = 0; t < 2 * length + kColumns; ++t) {
      const int64_t offset = length - 1 - t;  // j - i
      const int64_t held = offset < -max_offset ? -max_offset : offset > max_offset ? max_offset : offset;
      all[t] = rel_bias[held + max_offset];
    }
    bias = all + length - 1;
  }
  for (int64_t i = 0; i < length; i += kColumns) {
    const int64_t count = length - i < kColumns ? length - i : kColumns;
    const float* here = bias ? bias + i : nullptr;
    if (count > W)
      attend_block<2>(q + i * ld, k, v, ld, count, length, K, scale, here, scratch, out + i * ldo, ldo);
    else
      attend_block<1>(q + i * ld, k, v, ld, count, length, K, scale, here, scratch, out + i * ldo, ldo);
  }
}

// The arrays of a pass. Shared by the team: x, context (rows, D), sums and inner for `block` rows; each worker has its
// own qkv of one group of heads, and scratch.
template <class T>
struct Arrays {
  int64_t ldx, ldc, ldi, ldq, block, shared_bytes, worker_bytes;
  T *x, *context, *inner;
  float *sums, *qkv, *scratch;

  Arrays(const EncoderWeights<T>& e, int64_t rows, int64_t max_seqlen, int workers) {
    const int64_t widest = e.E > e.D ? e.E : e.D;
    block = workers > 1 || rows < kRows ? rows : kRows;
    ldx = stride<T>(widest);
    ldc = stride<float>(widest);
    ldi = stride<T>(workers > 1 ? e.F : e.F < kDepth ? e.F : kDepth);
    ldq = stride<float>(3 * round_up(e.group * e.K, kColumns));
    size_x = round_up(rows * ldx * sizeof(T), 64);
    size_inner = round_up(block * ldi * sizeof(T), 64);
    size_qkv = round_up((rows * ldq + W) * sizeof(float), 64);
    shared_bytes = 2 * size_x + size_inner + block * ldc * sizeof(float);
    const int64_t attention = attend_scratch(max_seqlen, e.K);
    worker_bytes = size_qkv + round_up((attention > widest ? attention : widest) * sizeof(float) + 128, 128);
  }

  void place(char* memory, int worker) {
    x = reinterpret_cast<T*>(memory);
    context = reinterpret_cast<T*>(memory + size_x);
    inner = reinterpret_cast<T*>(memory + 2 * size_x);
    sums = reinterpret_cast<float*>(memory + 2 * size_x + size_inner);
    char* own = memory + shared_bytes + worker * worker_bytes;
    qkv = reinterpret_cast<float*>(own);
    scratch = reinterpret_cast<float*>(own + size_qkv);
  }

 private:
  int64_t size_x, size_inner, size_qkv;
};

template <class T>
int64_t encoder_bytes(const EncoderWeights<T>& e, int64_t rows, int64_t max_seqlen, int workers) {
  const Arrays<T> arrays(e, rows, max_seqlen, workers);
  return arrays.shared_bytes + workers * arrays.worker_bytes;
}

// What one worker of a team does; alone it is the whole team.
template <class T>
struct Worker {
  const EncoderWeights<T>& e;
  const Tokens& tokens;
  Arrays<T> at;
  int64_t begin, rows;  // tokens of the pass
  Team team;

  // f(task) for all tasks: those that no other worker has taken, and then until all are done.
  template <class F>
  INLINE void share(int64_t count, F f) {
    if (team.workers == 1) {
      for (int64_t task = 0; task < count; ++task) f(task);
      return;
    }
    Stage& stage = *team.stages++;
    int32_t mine = 0;
    for (int32_t task; (task = __atomic_fetch_add(&stage.taken, 1, __ATOMIC_RELAXED)) < count; ++mine) f(task);
    if (mine) __atomic_fetch_add(&stage.done, mine, __ATOMIC_RELEASE);
    for (int turn = 0; __atomic_load_n(&stage.done, __ATOMIC_ACQUIRE) < count; ++turn) relax(turn);
  }

  // The same for rows, some at a time: one is too small a task.
  template <class F>
  INLINE void share_rows(int64_t count, F f) {
    constexpr int64_t kTogether = 4;
    share((count + kTogether - 1) / kTogether, [&](int64_t task) LAMBDA {
      const int64_t first = task * kTogether, last = count < first + kTogether ? count : first + kTogether;
      for (int64_t row = first; row < last; ++row) f(row);
    });
  }

  // to = LN(z) with z in memory that may be overwritten by its vectors.
  template <class Z>
  INLINE void normalise(Z z, float* row, const Norm& norm, int64_t D, T* to) const {
    each_vector(D, [&](int64_t i, int n) LAMBDA { store(row + i, z(i, n), n); });
    const RowStats stats = row_stats(row, D, norm.eps);
    each_vector(D, [&](int64_t i, int n) LAMBDA {
      store(to + i, normalised(load(row + i, n), stats) * load(norm.weight + i, n) + load(norm.bias + i, n), n);
    });
  }

  // One panel of columns for all rows of a block, through an activation.
  template <class Form>
  INLINE void activate(const Linear<T>& w, int64_t p, int64_t count, const T* a, T* to, int64_t ldo) const {
    each_tile(count, [&](int64_t r, int64_t n) LAMBDA {
      alignas(64) float c[kTileRows * kColumns];
      multiply(w, p, 0, (w.in + kDepth - 1) / kDepth, n, a + r * at.ldx, at.ldx, c, kColumns);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < kColumns; j += W)
          store(to + (r + i) * ldo + j, Form::value(load(c + i * kColumns + j)));
    });
  }

  void activate(Activation form, const Linear<T>& w, int64_t p, int64_t count, const T* a, T* to, int64_t ldo) const {
    switch (form) {
      case Activation::gelu: return activate<Erf>(w, p, count, a, to, ldo);
      case Activation::gelu_tanh: return activate<Tanh>(w, p, count, a, to, ldo);
      case Activation::relu: return activate<Relu>(w, p, count, a, to, ldo);
      case Activation::silu: return activate<Silu>(w, p, count, a, to, ldo);
      case Activation::identity: return activate<Identity>(w, p, count, a, to, ldo);
    }
  }

  void embed() {
    T* to = e.project.panels ? at.context : at.x;
    share_rows(rows, [&](int64_t r) LAMBDA {
      const int64_t token = begin + r;
      const T* word = e.word + tokens.input_ids[token] * e.E;
      const T* position = e.position + tokens.position_ids[token] * e.E;
      const T* type = e.token_type ? e.token_type + (tokens.type_ids ? tokens.type_ids[token] * e.E : 0) : nullptr;
      normalise(
          [&](int64_t i, int n) LAMBDA {
            const vf z = load(word + i, n);
            return (type ? z + load(type + i, n) : z) + load(position + i, n);
          },
          at.scratch, e.embed_norm, e.E, to + r * at.ldx);
    });
    if (e.project.panels)
      share(e.project.out / kColumns, [&](int64_t p) LAMBDA {
        activate(Activation::identity, e.project, p, rows, at.context, at.x + p * kColumns, at.ldx);
      });
  }

  // Queries, keys and values of some heads, and at once their attention: they never leave the worker's cache.
  void attention(const EncoderLayer<T>& layer) {
    const int64_t padded = round_up(e.group * e.K, kColumns), panels = 3 * padded / kColumns;
    share((e.H + e.group - 1) / e.group, [&](int64_t g) LAMBDA {
      for (int64_t p = 0; p < panels; ++p)
        each_tile(rows, [&](int64_t r, int64_t n) LAMBDA {
          multiply(layer.qkv, g * panels + p, 0, (e.D + kDepth - 1) / kDepth, n, at.x + r * at.ldx, at.ldx,
                   at.qkv + r * at.ldq + p * kColumns, at.ldq);
        });
      for (int64_t s = tokens.first; s < tokens.last; ++s) {
        const int64_t row = tokens.cu_seqlens[s] - begin, length = tokens.cu_seqlens[s + 1] - tokens.cu_seqlens[s];
        for (int64_t h = 0; h < e.group && g * e.group + h < e.H; ++h) {
          const float* q = at.qkv + row * at.ldq + h * e.K;
          const int64_t head = g * e.group + h;
          attend(q, q + padded, q + 2 * padded, at.ldq, length, e.K,
                 e.rel_bias ? e.rel_bias + head * (2 * e.max_offset + 1) : nullptr, e.max_offset, at.scratch,
                 at.context + row * at.ldx + head * e.K, at.ldx);
        }
      }
    });
  }

  // x = LN(sums + x) for `count` rows from r0 on; the last layer's go to `out`.
  void add_layer_norm(const Norm& norm, int64_t r0, int64_t count, T* out, int64_t ldo) {
    share_rows(count, [&](int64_t r) LAMBDA {
      float* row = at.sums + r * at.ldc;
      const T* residual = at.x + (r0 + r) * at.ldx;
      normalise([&](int64_t i, int n) LAMBDA { return load(row + i, n) + load(residual + i, n); }, row, norm, e.D,
                out + (r0 + r) * ldo);
    });
  }

  void feed_forward(const EncoderLayer<T>& layer, int64_t r0, int64_t count) {
    constexpr int64_t kPanels = kDepth / kColumns;  // of inner columns that are one depth block of `output`
    const int64_t blocks = (e.F + kDepth - 1) / kDepth, span = team.workers > 1 ? blocks : 1;
    const int64_t panels = layer.intermediate.out / kColumns;
    for (int64_t d = 0; d < blocks; d += span) {
      const int64_t first = d * kPanels, last = panels < (d + span) * kPanels ? panels : (d + span) * kPanels;
      share(last - first, [&](int64_t p) LAMBDA {
        activate(e.activation, layer.intermediate, first + p, count, at.x + r0 * at.ldx, at.inner + p * kColumns,
                 at.ldi);
      });
      accumulate(layer.output, d, d + span, count, at.inner, at.ldi);
    }
  }

  // sums = bias or sums, + A W over depth blocks [first, last).
  void accumulate(const Linear<T>& w, int64_t first, int64_t last, int64_t count, const T* a, int64_t lda) {
    share(w.out / kColumns, [&](int64_t p) LAMBDA {
      each_tile(count, [&](int64_t r, int64_t n) LAMBDA {
        multiply(w, p, first, last, n, a + r * lda, lda, at.sums + r * at.ldc + p * kColumns, at.ldc);
      });
    });
  }

  void run(T* out) {
    embed();
    for (int64_t l = 0; l < e.num_layers; ++l) {
      const EncoderLayer<T>& layer = *e.layers[l];
      const bool is_last = l + 1 == e.num_layers;
      attention(layer);
      for (int64_t r0 = 0; r0 < rows; r0 += at.block) {
        const int64_t count = rows - r0 < at.block ? rows - r0 : at.block;
        accumulate(layer.dense, 0, (e.D + kDepth - 1) / kDepth, count, at.context + r0 * at.ldx, at.ldx);
        add_layer_norm(layer.attention_norm, r0, count, at.x, at.ldx);
        feed_forward(layer, r0, count);
        add_layer_norm(layer.output_norm, r0, count, is_last ? out + begin * e.D : at.x, is_last ? e.D : at.ldx);
      }
    }
  }
};

// A team takes all rows and all inner columns at once: what `run` shares is two stages to embed, six a layer.
template <class T>
int64_t encoder_stages(const EncoderWeights<T>& e) {
  return 2 + 6 * e.num_layers;
}

template <class T>
void encoder_fwd(const EncoderWeights<T>& e, const Tokens& tokens, int64_t max_seqlen, T* out, char* memory,
                 Team team) {
  const int64_t begin = tokens.cu_seqlens[tokens.first], rows = tokens.cu_seqlens[tokens.last] - begin;
  Worker<T> self{e, tokens, Arrays<T>(e, rows, max_seqlen, team.workers), begin, rows, team};
  self.at.place(memory, team.worker);
  self.run(out);
}

}  // namespace

template <class T>
void add_encoder(Kernels<T>& table) {
  table.panel_columns = kColumns;
  table.pack_linear = pack_linear;
  table.encoder_bytes = encoder_bytes;
  table.encoder_stages = encoder_stages;
  table.encoder_fwd = encoder_fwd;
}
template void add_encoder(Kernels<float>&);
template void add_encoder(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
