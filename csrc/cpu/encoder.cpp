// A whole forward pass over some sequences of a packed batch, by one thread or by a team that shares every stage.
//
// A row goes through the same sums in the same order either way: neither the batch nor the threads change a bit.
#include "encoder.h"

#include "cpu/attend_pairs.h"
#include "cpu/gelu.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// Whether this instruction set has weights of type T.
template <class T>
constexpr bool kOffered = true;
#if !defined(FASTBERT_AMX)
template <>
constexpr bool kOffered<split> = false;  // three products of bf16 would be no faster than one of fp32
#endif

// Rows that go through the feed-forward network together: what they need stays in L2 while the weights stream by.
constexpr int64_t kBlock = 256;

struct Relu {
  static INLINE vf value(vf z) { return z > 0.f ? z : (z == z ? vf{} : z); }
};
struct Silu {
  static INLINE vf value(vf z) { return z / (1.f + exp(-z)); }
};
struct Identity {
  static INLINE vf value(vf z) { return z; }
};

// Whether attention may multiply bf16, where it can, and erf be approximated as coarsely: not where weights are fp32.
template <class T>
constexpr bool kCoarse = true;
template <>
constexpr bool kCoarse<float> = false;
template <>
constexpr bool kCoarse<split> = false;

// The arrays of a pass. Shared by the team: x, context (rows, D), sums and inner for `block` rows, and where products
// read forms of their own, that of x or context, and of inner. Each worker has its own qkv of one group of heads, and scratch.
template <class T>
struct Arrays {
  int64_t ldx, ldc, ldi, ldq, block, shared_bytes, worker_bytes;
  Stored<T> *x, *context, *inner;
  Operands<T> outer_operands, inner_operands;
  float *sums, *qkv, *scratch;

  Arrays(const EncoderWeights<T>& e, int64_t rows, int64_t max_seqlen, int workers) {
    const int64_t widest = e.E > e.D ? e.E : e.D, width = workers > 1 ? e.F : e.F < kDepth ? e.F : kDepth;
    block = workers > 1 || rows < kBlock ? rows : kBlock;
    const int64_t read = round_up(rows, kRows<T>), read_block = round_up(block, kRows<T>);  // and written by the last tile
    ldx = stride<Stored<T>>(widest);
    ldc = stride<float>(widest);
    ldi = stride<Stored<T>>(width);
    ldq = stride<float>(3 * round_up(e.group * e.K, kColumns));
    size_x = round_up(read * ldx * sizeof(Stored<T>), 64);
    size_inner = round_up(read_block * ldi * sizeof(Stored<T>), 64);
    size_sums = round_up(read_block * ldc * sizeof(float), 64);
    size_qkv = round_up((read * ldq + W) * sizeof(float), 64);
    shared_bytes = 2 * size_x + size_inner + size_sums;
    outer_operands = Operands<T>(read, widest);
    inner_operands = Operands<T>(read_block, width);
    shared_bytes += outer_operands.nbytes() + inner_operands.nbytes();
    const int64_t attention = (kCoarse<T> ? attend_pairs_scratch : attend_scratch)(max_seqlen, e.K);
    worker_bytes = size_qkv + round_up((attention > widest ? attention : widest) * sizeof(float) + 128, 128);
  }

  void place(char* memory, int worker) {
    x = reinterpret_cast<Stored<T>*>(memory);
    context = reinterpret_cast<Stored<T>*>(memory + size_x);
    inner = reinterpret_cast<Stored<T>*>(memory + 2 * size_x);
    sums = reinterpret_cast<float*>(memory + 2 * size_x + size_inner);
    outer_operands.place(memory + 2 * size_x + size_inner + size_sums);
    inner_operands.place(memory + 2 * size_x + size_inner + size_sums + outer_operands.nbytes());
    char* own = memory + shared_bytes + worker * worker_bytes;
    qkv = reinterpret_cast<float*>(own);
    scratch = reinterpret_cast<float*>(own + size_qkv);
  }

 private:
  int64_t size_x, size_inner, size_sums, size_qkv;
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
  using S = Stored<T>;

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

  // The same, for `together` neighbours at a time.
  template <class F>
  INLINE void share_runs(int64_t count, int64_t together, F f) {
    share((count + together - 1) / together, [&](int64_t task) LAMBDA {
      const int64_t first = task * together, last = count < first + together ? count : first + together;
      for (int64_t i = first; i < last; ++i) f(i);
    });
  }

  // Of rows, one is too small a task.
  template <class F>
  INLINE void share_rows(int64_t count, F f) {
    share_runs(count, 4, f);
  }

  // Of panels, a run is one stream from memory: what a tile asks for past its panel's end is the worker's own next one.
  template <class F>
  INLINE void share_panels(int64_t count, F f) {
    const int64_t tasks = 4 * team.workers;
    share_runs(count, (count + tasks - 1) / tasks, f);
  }

  // What a product reads of these rows: themselves, or what `prepare` made of them.
  Rows<T> operand(const S* from, int64_t ld, const Operands<T>& operands) const {
    if constexpr (kPrepared<T>)
      return operands.all();
    else
      return {from, ld};
  }
  Rows<T> operand_of_x() const { return operand(at.x, at.ldx, at.outer_operands); }

  // Row `row`, as a product with w reads it from depth block `block` on.
  INLINE void prepare(const Linear<T>& w, const Operands<T>& operands, int64_t row, const S* from, int64_t width,
                      int64_t block = 0) const {
    if constexpr (kPrepared<T>) operands.fill(w, row, from, width, block);
  }

  // The same for `count` rows from r0 on, where no stage could do it along the way.
  void prepare_rows(const Linear<T>& w, const Operands<T>& operands, int64_t r0, int64_t count, const S* from,
                    int64_t ld, int64_t width, int64_t block = 0) {
    if constexpr (kPrepared<T>)
      share_rows(count, [&](int64_t r) LAMBDA { prepare(w, operands, r0 + r, from + (r0 + r) * ld, width, block); });
  }

  // to = LN(z) with z in memory that may be overwritten by its vectors.
  template <class Z>
  INLINE void normalise(Z z, float* row, const Norm& norm, int64_t D, S* to) const {
    each_vector(D, [&](int64_t i, int n) LAMBDA { store(row + i, z(i, n), n); });
    const RowStats stats = row_stats(row, D, norm.eps);
    each_vector(D, [&](int64_t i, int n) LAMBDA {
      store(to + i, normalised(load(row + i, n), stats) * load(norm.weight + i, n) + load(norm.bias + i, n), n);
    });
  }

  // C = bias or C, + A W of panel p over depth blocks [first, last), for n of `rows` rows, from r on. Where that can be
  // done beside, the panel after is brought to L2, a part with each tile and each step; and beside(step).
  template <class Beside>
  INLINE void product(const Linear<T>& w, int64_t p, int64_t first, int64_t last, int64_t r, int64_t n, int64_t rows,
                      Rows<T> a, float* c, int64_t ldc, Beside beside) const {
    if constexpr (kBeside<T>) {
      constexpr int64_t kLine = 64, kLines = kDepthStep<T> * kColumns * sizeof(T) / kLine;  // of a step
      const int64_t tiles = (rows + kRows<T> - 1) / kRows<T>, share = (kLines + tiles - 1) / tiles;
      const char* next = reinterpret_cast<const char*>(panel_of(w, first, p + 1)) + r / kRows<T> * share * kLine;
      multiply(w, p, first, last, n, a.from(r), c, ldc, [&](int64_t step) LAMBDA {
        for (int64_t i = 0; i < share; ++i) __builtin_prefetch(next + (step * kLines + i) * kLine, 0, 2);
        beside(step);
      });
    } else {
      multiply(w, p, first, last, n, a.from(r), c, ldc);
    }
  }
  INLINE void product(const Linear<T>& w, int64_t p, int64_t first, int64_t last, int64_t r, int64_t n, int64_t rows,
                      Rows<T> a, float* c, int64_t ldc) const {
    product(w, p, first, last, r, n, rows, a, c, ldc, [](int64_t) LAMBDA {});
  }

  // One panel of columns for all rows of a block, through an activation; where that can be done beside, while the tile
  // after is multiplied.
  template <class Form>
  INLINE void activate(const Linear<T>& w, int64_t p, int64_t count, Rows<T> a, S* to, int64_t ldo) const {
    alignas(64) float c[kBeside<T> ? 2 : 1][kRows<T> * kColumns];
    const auto finish = [&](const float* sums, int64_t r, int64_t from, int64_t until) LAMBDA {
      for (int64_t i = from; i < until; ++i)
        for (int64_t j = 0; j < kColumns; j += W)
          store(to + (r + i) * ldo + j, Form::value(load(sums + i * kColumns + j)));
    };
    int64_t turn = 0, waiting = 0;  // rows of the tile before
    each_tile<T>(count, [&](int64_t r, int64_t n) LAMBDA {
      if constexpr (kBeside<T>) {
        const int64_t steps = (w.in + kDepthStep<T> - 1) / kDepthStep<T>, some = (waiting + steps - 1) / steps;
        const float* before = c[1 - turn];
        product(w, p, 0, num_blocks(w.in), r, n, count, a, c[turn], kColumns, [&](int64_t step) LAMBDA {
          const int64_t from = step * some, until = from + some;
          finish(before, r - kRows<T>, from, until < waiting ? until : waiting);
        });
        turn = 1 - turn;
        waiting = n;
      } else {
        product(w, p, 0, num_blocks(w.in), r, n, count, a, c[0], kColumns);
        finish(c[0], r, 0, n);
      }
    });
    if constexpr (kBeside<T>) finish(c[1 - turn], (count - 1) / kRows<T> * kRows<T>, 0, waiting);
  }

  void activate(Activation form, const Linear<T>& w, int64_t p, int64_t count, Rows<T> a, S* to, int64_t ldo) const {
    switch (form) {
      case Activation::gelu:
        if constexpr (kCoarse<T> && kPairs) return activate<ErfCoarse>(w, p, count, a, to, ldo);
        return activate<Erf>(w, p, count, a, to, ldo);
      case Activation::gelu_tanh: return activate<Tanh>(w, p, count, a, to, ldo);
      case Activation::relu: return activate<Relu>(w, p, count, a, to, ldo);
      case Activation::silu: return activate<Silu>(w, p, count, a, to, ldo);
      case Activation::identity: return activate<Identity>(w, p, count, a, to, ldo);
    }
  }

  void embed() {
    const Linear<T>& first = e.layers[0]->qkv;
    S* to = e.project.panels ? at.context : at.x;
    share_rows(rows, [&](int64_t r) LAMBDA {
      const int64_t token = begin + r;
      if (kDepthStep<T> > 2) {  // what a tile reads past a row meets zero weights, and must be finite
        memset(static_cast<void*>(at.x + r * at.ldx), 0, at.ldx * sizeof(S));
        memset(static_cast<void*>(at.context + r * at.ldx), 0, at.ldx * sizeof(S));
      }
      const S* word = e.word + tokens.input_ids[token] * e.E;
      const S* position = e.position + tokens.position_ids[token] * e.E;
      const S* type = e.token_type ? e.token_type + (tokens.type_ids ? tokens.type_ids[token] * e.E : 0) : nullptr;
      normalise(
          [&](int64_t i, int n) LAMBDA {
            const vf z = load(word + i, n);
            return (type ? z + load(type + i, n) : z) + load(position + i, n);
          },
          at.scratch, e.embed_norm, e.E, to + r * at.ldx);
      prepare(e.project.panels ? e.project : first, at.outer_operands, r, to + r * at.ldx, e.E);
    });
    if (e.project.panels) {
      const Rows<T> from = operand(at.context, at.ldx, at.outer_operands);
      share_panels(e.project.out / kColumns, [&](int64_t p) LAMBDA {
        activate(Activation::identity, e.project, p, rows, from, at.x + p * kColumns, at.ldx);
      });
      prepare_rows(first, at.outer_operands, 0, rows, at.x, at.ldx, e.D);
    }
  }

  // Queries, keys and values of some heads, and at once their attention: they never leave the worker's cache.
  void attention(const EncoderLayer<T>& layer) {
    const int64_t padded = round_up(e.group * e.K, kColumns), panels = 3 * padded / kColumns;
    share((e.H + e.group - 1) / e.group, [&](int64_t g) LAMBDA {
      for (int64_t p = 0; p < panels; ++p)
        each_tile<T>(rows, [&](int64_t r, int64_t n) LAMBDA {
          product(layer.qkv, g * panels + p, 0, num_blocks(e.D), r, n, rows, operand_of_x(),
                  at.qkv + r * at.ldq + p * kColumns, at.ldq);
        });
      for (int64_t s = tokens.first; s < tokens.last; ++s) {
        const int64_t row = tokens.cu_seqlens[s] - begin, length = tokens.cu_seqlens[s + 1] - tokens.cu_seqlens[s];
        for (int64_t h = 0; h < e.group && g * e.group + h < e.H; ++h) {
          const float* q = at.qkv + row * at.ldq + h * e.K;
          const int64_t head = g * e.group + h;
          const float* bias = e.rel_bias ? e.rel_bias + head * (2 * e.max_offset + 1) : nullptr;
          S* to = at.context + row * at.ldx + head * e.K;
          const float *k = q + padded, *v = k + padded;
          if constexpr (kCoarse<T>)
            attend_pairs(q, k, v, at.ldq, length, e.K, bias, e.max_offset, at.scratch, to, at.ldx);
          else
            attend(q, k, v, at.ldq, length, e.K, bias, e.max_offset, at.scratch, to, at.ldx);
        }
      }
    });
  }

  // x = LN(sums + x) for `count` rows from r0 on, which `next` reads; without one they are the last layer's, for `out`.
  void add_layer_norm(const Norm& norm, const Linear<T>* next, int64_t r0, int64_t count, S* out) {
    share_rows(count, [&](int64_t r) LAMBDA {
      float* row = at.sums + r * at.ldc;
      S* x = at.x + (r0 + r) * at.ldx;
      normalise([&](int64_t i, int n) LAMBDA { return load(row + i, n) + load(x + i, n); }, row, norm, e.D,
                next ? x : out + (begin + r0 + r) * e.D);
      if (next) prepare(*next, at.outer_operands, r0 + r, x, e.D);
    });
  }

  void feed_forward(const EncoderLayer<T>& layer, int64_t r0, int64_t count) {
    constexpr int64_t kPanels = kDepth / kColumns;  // of inner columns that are one depth block of `output`
    const int64_t blocks = num_blocks(e.F), span = team.workers > 1 ? blocks : 1;
    const int64_t panels = layer.intermediate.out / kColumns;
    for (int64_t d = 0; d < blocks; d += span) {
      const int64_t first = d * kPanels, last = panels < (d + span) * kPanels ? panels : (d + span) * kPanels;
      share_panels(last - first, [&](int64_t p) LAMBDA {
        activate(e.activation, layer.intermediate, first + p, count, operand_of_x().from(r0), at.inner + p * kColumns,
                 at.ldi);
      });
      const int64_t width = e.F - d * kDepth < span * kDepth ? e.F - d * kDepth : span * kDepth;
      prepare_rows(layer.output, at.inner_operands, 0, count, at.inner, at.ldi, width, d);
      accumulate(layer.output, d, d + span, count, operand(at.inner, at.ldi, at.inner_operands));
    }
  }

  // sums = bias or sums, + A W over depth blocks [first, last).
  void accumulate(const Linear<T>& w, int64_t first, int64_t last, int64_t count, Rows<T> a) {
    share_panels(w.out / kColumns, [&](int64_t p) LAMBDA {
      each_tile<T>(count, [&](int64_t r, int64_t n) LAMBDA {
        product(w, p, first, last, r, n, count, a, at.sums + r * at.ldc + p * kColumns, at.ldc);
      });
    });
  }

  void run(S* out) {
    embed();
    for (int64_t l = 0; l < e.num_layers; ++l) {
      const EncoderLayer<T>& layer = *e.layers[l];
      const Linear<T>* next = l + 1 < e.num_layers ? &e.layers[l + 1]->qkv : nullptr;
      attention(layer);
      for (int64_t r0 = 0; r0 < rows; r0 += at.block) {
        const int64_t count = rows - r0 < at.block ? rows - r0 : at.block;
        prepare_rows(layer.dense, at.outer_operands, r0, count, at.context, at.ldx, e.D);
        accumulate(layer.dense, 0, num_blocks(e.D), count, operand(at.context, at.ldx, at.outer_operands).from(r0));
        add_layer_norm(layer.attention_norm, &layer.intermediate, r0, count, nullptr);
        feed_forward(layer, r0, count);
        add_layer_norm(layer.output_norm, next, r0, count, out);
      }
    }
  }
};

// A team takes all rows and all inner columns at once: what `run` shares is two stages to embed, six a layer; and those
// that only prepare operands, one to embed, two a layer.
template <class T>
int64_t encoder_stages(const EncoderWeights<T>& e) {
  return kPrepared<T> ? 3 + 8 * e.num_layers : 2 + 6 * e.num_layers;
}

template <class T>
void encoder_fwd(const EncoderWeights<T>& e, const Tokens& tokens, int64_t max_seqlen, Stored<T>* out, char* memory,
                 Team team) {
  const int64_t begin = tokens.cu_seqlens[tokens.first], rows = tokens.cu_seqlens[tokens.last] - begin;
#if defined(FASTBERT_AMX)
  const Tiles tiles;
#endif
  Worker<T> self{e, tokens, Arrays<T>(e, rows, max_seqlen, team.workers), begin, rows, team};
  self.at.place(memory, team.worker);
  self.run(out);
}

}  // namespace

template <class T>
EncoderKernels<T> encoder_table() {
  if constexpr (kOffered<T>)
    return {kColumns, panels_nbytes<T>, pack_linear<T>, encoder_bytes<T>, encoder_stages<T>, encoder_fwd<T>};
  else
    return {};
}
template EncoderKernels<float> encoder_table();
template EncoderKernels<bf16> encoder_table();
template EncoderKernels<int8_t> encoder_table();
template EncoderKernels<split> encoder_table();

bool offers_fours() { return kFours; }

#if defined(FASTBERT_AMX)
// Whether the tiles of this CPU compute what they should: small integers, whose sums are exact in every form.
bool tiles_agree() {
  constexpr int kM = 27, kK = 96;
  alignas(64) bf16 a[32][kK] = {}, b[kK / 2][2 * kColumns];
  alignas(64) std::uint8_t bytes[32][2 * kK] = {};
  alignas(64) int8_t panel[2 * kK * kColumns];
  const auto number = [](int i, int j) { return (i * 37 + j * 11) % 15 - 7; };
  const auto half = [](int x) {
    const float wide = static_cast<float>(x);
    bf16 narrow;
    memcpy(&narrow, reinterpret_cast<const char*>(&wide) + 2, sizeof narrow);
    return narrow;
  };
  for (int m = 0; m < kM; ++m)
    for (int k = 0; k < 2 * kK; ++k) {
      if (k < kK) a[m][k] = half(number(m, k));
      bytes[m][k] = static_cast<std::uint8_t>(number(m, k) + 128);
    }
  for (int k = 0; k < 2 * kK; ++k)
    for (int n = 0; n < kColumns; ++n) {
      if (k < kK) b[k / 2][2 * n + k % 2] = half(number(n, 3 * k));
      panel[k / 4 * 4 * kColumns + 4 * n + k % 4] = static_cast<int8_t>(number(n, 3 * k));
    }
  alignas(64) float sums[32][kColumns];
  alignas(64) int32_t integers[32][kColumns];
  {
    const Tiles tiles;
    const auto nothing = [](int64_t) LAMBDA {};
    amx_products<2, false>(kM, kK * 2 / kTileBytes, reinterpret_cast<const char*>(a), sizeof a[0],
                           reinterpret_cast<const char*>(b), nullptr, 0, sums, sizeof sums[0], nothing);
    amx_products<2, true>(kM, 2 * kK / kTileBytes, reinterpret_cast<const char*>(bytes), sizeof bytes[0],
                          reinterpret_cast<const char*>(panel), nullptr, 0, integers, sizeof integers[0], nothing);
  }
  bool agree = true;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kColumns; ++n) {
      int products = 0, shifted = 0;
      for (int k = 0; k < 2 * kK; ++k) {
        if (k < kK) products += number(m, k) * number(n, 3 * k);
        shifted += (number(m, k) + 128) * number(n, 3 * k);
      }
      agree &= sums[m][n] == static_cast<float>(products) && integers[m][n] == shifted;
    }
  return agree;
}
#endif

}  // namespace fastbert::FASTBERT_ISA
