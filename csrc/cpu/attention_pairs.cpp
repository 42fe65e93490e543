// Attention over packed sequences in bf16, forward and backward, by instructions that multiply pairs of bf16. Sums and
// softmax are fp32; probabilities and their gradients are rounded to bf16 before they are multiplied, as the inputs are.
//
// One task is one (sequence, head), as in attention.cpp. Scores lie (key, query), 32 queries at a time: what a softmax
// knows of a query is a lane of two vectors, keys and values are read where they lie, and rows of probabilities as
// they are computed. Sequence by sequence and tile by tile the order of sums is fixed.
#include "cpu/attend_pairs.h"
#include "cpu/attention.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {

#if defined(__AVX512BF16__) && !defined(FASTBERT_AMX)
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kBlock = kColumns;                  // queries at a time
constexpr int64_t kPair = 2 * kColumns;               // bf16 of a panel's pair of rows
constexpr int64_t kKeys = kRows<bf16> / 2 * 2;        // of a tile: whole pairs

INLINE __m512i load_words(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, p);
}

// A panel of up to 32 rows of K features, as the right side of a product over features.
INLINE void pack_columns(const bf16* from, int64_t ld, int64_t count, int64_t K, bf16* panel) {
  for (int64_t i = 0; i < kBlock; i += W)
    for (int64_t d = 0; d < K; d += 2 * W) {
      __m512 rows[W];
      for (int64_t r = 0; r < W; ++r)
        rows[r] = i + r < count ? (__m512)load_words(from + (i + r) * ld + d, K - d) : _mm512_setzero_ps();
      transpose(rows);
      for (int64_t r = 0; r < W; ++r) _mm512_storeu_ps(panel + (d / 2 + r) * kPair + 2 * i, rows[r]);
    }
}

// Panels of 32 features each of up to 32 rows, as the right side of a product over rows.
INLINE void pack_rows(const bf16* from, int64_t ld, int64_t count, int64_t K, bf16* panels) {
  for (int64_t d = 0; d < K; d += W)
    for (int64_t i = 0; i < count; i += 2) {
      const auto row = [&](int64_t r) LAMBDA {
        return r < count ? load(from + r * ld + d, static_cast<int>(K - d < W ? K - d : W)) : vf{};
      };
      store_pairs(panels + d / kColumns * kBlock * kColumns + i / 2 * kPair + 2 * (d % kColumns), row(i), row(i + 1));
    }
}

// to[d * ld + j] = from[j * step + d] for j < length and d < K, zeros up to the next multiple of W.
INLINE void pack_transposed(const bf16* from, int64_t step, int64_t length, int64_t K, bf16* to, int64_t ld) {
  for (int64_t j = 0; j < length; j += W)
    for (int64_t d = 0; d < K; d += W) {
      __m512 rows[W];
      for (int64_t r = 0; r < W; ++r)
        rows[r] = j + r < length ? (__m512)load(from + (j + r) * step + d, static_cast<int>(K - d < W ? K - d : W))
                                 : _mm512_setzero_ps();
      transpose(rows);
      for (int64_t r = 0; r < W && d + r < K; ++r) store(to + (d + r) * ld + j, (vf)rows[r]);
    }
}

// to[i * ld + d] = scale of query i x from[d * 32 + i] for i < count, d < K.
INLINE void store_transposed(const float* from, const vf* scale, int64_t count, int64_t K, bf16* to, int64_t ld) {
  for (int64_t i = 0; i < count; i += W)
    for (int64_t d = 0; d < K; d += W) {
      const int n = static_cast<int>(K - d < W ? K - d : W);
      __m512 rows[W];
      for (int r = 0; r < W; ++r)
        rows[r] = r < n ? (__m512)(load(from + (d + r) * kColumns + i) * scale[i / W]) : _mm512_setzero_ps();
      transpose(rows);
      for (int64_t r = 0; r < W && i + r < count; ++r) store(to + (i + r) * ld + d, (vf)rows[r], n);
    }
}

// C (rows, 32) = A B over `depth`, B one panel of which NV vectors are wanted.
INLINE void multiply(int NV, int64_t rows, int64_t depth, const bf16* a, int64_t lda, const bf16* panel, const float* add,
                     int64_t ld_add, float* c, int64_t ldc) {
  each_tile<bf16>(rows, [&](int64_t r, int64_t n) LAMBDA {
    const float* from = add ? add + r * ld_add : nullptr;
    if (NV == 2)
      panel_tile<2>(n, depth, a + r * lda, lda, panel, from, ld_add, c + r * ldc, ldc);
    else
      panel_tile<1>(n, depth, a + r * lda, lda, panel, from, ld_add, c + r * ldc, ldc);
  });
}

// Dropout of one vector of queries, whose rows of probabilities are H apart.
class QueryDropout {
 public:
  QueryDropout(const Dropout& dropout, int64_t first, int64_t H) : dropout_(dropout) {
    const vu rows = splat(static_cast<uint32_t>(first)) + lanes() * static_cast<uint32_t>(H);
    rows_ = hash32(rows ^ hash32(dropout.seed));
  }
  INLINE vf operator()(vf x, int64_t key) const {
    if (dropout_.threshold == 0) return x;
    const vu bits = hash32(rows_ + static_cast<uint32_t>(key));
    return bits >= splat(dropout_.threshold) ? x * dropout_.scale : vf{};
  }

 private:
  Dropout dropout_;
  vu rows_;
};

void attention_pairs_fwd(const bf16* qkv, const float* rel_bias, const int32_t* cu_seqlens, bf16* out, float* lse,
                         int64_t S, int64_t H, int64_t K, int64_t num_offsets, int64_t max_seqlen, int64_t half,
                         float scale, Dropout dropout) {
  const int64_t step = 3 * H * K, ldk = round_up(K, kColumns), longest = round_up(max_seqlen, kColumns);
  const BiasLines biases(rel_bias, num_offsets, H, max_seqlen, half, true);
  const bool biased = rel_bias || half < max_seqlen;
#pragma omp parallel if (cu_seqlens[S] * H * K > kParallelWork / 4)
  {
    // Values transposed, queries and probabilities, in bf16; scores and outputs.
    const Scratch scratch((longest * ldk + kBlock * (ldk + longest)) / 2 + kBlock * (longest + ldk));
#pragma omp for schedule(dynamic, 2)
    for (int64_t index = 0; index < S * H; ++index) {
      const Task task(index, cu_seqlens, H, K);
      const bf16* base = qkv + task.begin * step + task.head * K;
      float* scores = scratch.get();
      float* result = scores + kBlock * longest;
      bf16* values = reinterpret_cast<bf16*>(result + kBlock * ldk);
      bf16* queries = values + longest * ldk;
      bf16* probs = queries + kBlock * ldk;
      pack_transposed(base + 2 * H * K, step, task.length, K, values, longest);
      for (int64_t q = 0; q < task.length; q += kBlock) {
        const int64_t count = task.length - q < kBlock ? task.length - q : kBlock;
        const int NV = count > W ? 2 : 1;
        const Span seen(q, count, half, task.length);
        pack_columns(base + q * step, step, count, K, queries);
        multiply(NV, seen.size(), K, base + H * K + seen.first * step, step, queries, nullptr, 0, scores, kColumns);
        vf inverse[2];
        for (int v = 0; v < NV; ++v) {
          float* column = scores + v * W;
          const int64_t first = q + v * W, place = (task.begin + first) * H + task.head;
          const float* bias = biases.row(task.head, seen.first) + first;  // one back for each key
          vf top = splat(-__builtin_inff()), total{};
          for (int64_t j = 0; j < seen.size(); ++j) {
            vf x = load(column + j * kColumns) * scale;
            if (biased) x += load(bias - j);
            store(column + j * kColumns, x);
            top = max(x, top);
          }
          const QueryDropout drop(dropout, place, H);
          const auto weight = [&](int64_t j) LAMBDA {
            if (j >= seen.size()) return vf{};
            const vf p = exp2_coarse((load(column + j * kColumns) - top) * kLog2E);
            total += p;
            return drop(p, seen.first + j);
          };
          for (int64_t j = 0; j < seen.size(); j += 2) {
            const vf low = weight(j), high = weight(j + 1);
            store_pairs(probs + j / 2 * kPair + 2 * W * v, low, high);
          }
          inverse[v] = 1.f / total;
          for (int64_t i = 0; i < W && v * W + i < count; ++i) lse[place + i * H] = top[i] + __builtin_logf(total[i]);
        }
        multiply(NV, K, seen.size(), values + seen.first, longest, probs, nullptr, 0, result, kColumns);
        store_transposed(result, inverse, count, K, out + ((task.begin + q) * H + task.head) * K, H * K);
      }
    }
  }
}

// As attention_bwd, on transposed scores: P^T = exp(scale K Q^T - lse), dV += P^T dO, dP^T = V dO^T,
// dS^T = P^T (dP^T - rowsum(dO O)), dK += scale dS^T Q, dQ^T = scale K^T dS^T.
void attention_pairs_bwd(const bf16* dout, const bf16* qkv, const float* rel_bias, const bf16* out, const float* lse,
                         const int32_t* cu_seqlens, bf16* dqkv, float* drel_bias, int64_t S, int64_t H, int64_t K,
                         int64_t num_offsets, int64_t max_seqlen, int64_t half, float scale, Dropout dropout) {
  const int64_t step = 3 * H * K, ldk = round_up(K, kColumns), longest = round_up(max_seqlen, kColumns);
  const BiasLines biases(rel_bias, num_offsets, H, max_seqlen, half, true);
  const bool biased = rel_bias || half < max_seqlen;
  const Scratch sums(rel_bias ? cu_seqlens[S] * H * 2 : 0);  // of a task, at (begin * H + head * length) * 2
#pragma omp parallel if (cu_seqlens[S] * H * K > kParallelWork / 8)
  {
    // Keys transposed, four panels of a block, probabilities and their gradients in two forms, in bf16; the gradients of
    // keys and values, that of queries, a tile of scores and one of their gradients, sums along diagonals.
    const int64_t halves = longest * ldk + 4 * kBlock * ldk + 3 * longest * kBlock;
    const Scratch scratch(halves / 2 + 2 * longest * ldk + kBlock * ldk + 2 * kRows<bf16> * kColumns + 2 * longest + kPair);
#pragma omp for schedule(dynamic, 2)
    for (int64_t index = 0; index < S * H; ++index) {
      const Task task(index, cu_seqlens, H, K);
      const int64_t n = task.length;
      const bf16* base = qkv + task.begin * step + task.head * K;
      bf16* dbase = dqkv + task.begin * step + task.head * K;
      float* dkeys = scratch.get();
      float* dvalues = dkeys + longest * ldk;
      float* dqueries = dvalues + longest * ldk;
      float* score = dqueries + kBlock * ldk;
      float* dprob = score + kRows<bf16> * kColumns;
      float* diagonals = dprob + kRows<bf16> * kColumns;  // sum of query - key = o at o + n - 1
      bf16* keys = reinterpret_cast<bf16*>(diagonals + 2 * longest + kPair);
      bf16* queries = keys + longest * ldk;
      bf16* douts = queries + kBlock * ldk;
      bf16* query_rows = douts + kBlock * ldk;
      bf16* dout_rows = query_rows + kBlock * ldk;
      bf16* probs = dout_rows + kBlock * ldk;
      bf16* dscores = probs + longest * kBlock;
      bf16* dscore_pairs = dscores + longest * kBlock;
      pack_transposed(base + H * K, step, n, K, keys, longest);
      memset(dkeys, 0, 2 * longest * ldk * sizeof(float));
      if (rel_bias) memset(diagonals, 0, (2 * longest + kPair) * sizeof(float));
      for (int64_t q = 0; q < n; q += kBlock) {
        const int64_t count = n - q < kBlock ? n - q : kBlock, start = (task.begin + q) * H + task.head;
        const int NV = count > W ? 2 : 1;
        const Span seen(q, count, half, n);
        const bf16* from = dout + start * K;
        pack_columns(base + q * step, step, count, K, queries);
        pack_columns(from, H * K, count, K, douts);
        pack_rows(base + q * step, step, count, K, query_rows);
        pack_rows(from, H * K, count, K, dout_rows);
        alignas(64) float deltas[kBlock] = {}, log_totals[kBlock] = {};
        for (int64_t i = 0; i < count; ++i) {
          vf products{};
          each_vector(K, [&](int64_t d, int lanes) LAMBDA {
            products += load(from + i * H * K + d, lanes) * load(out + (start + i * H) * K + d, lanes);
          });
          deltas[i] = quick_sum(products);
          log_totals[i] = lse[start + i * H];
        }
        const QueryDropout drops[2] = {{dropout, start, H}, {dropout, start + W * H, H}};
        for (int64_t r = 0; r < seen.size(); r += kKeys) {
          const int64_t rows = seen.size() - r < kKeys ? seen.size() - r : kKeys, key = seen.first + r;
          multiply(NV, rows, K, base + H * K + key * step, step, queries, nullptr, 0, score, kColumns);
          multiply(NV, rows, K, base + 2 * H * K + key * step, step, douts, nullptr, 0, dprob, kColumns);
          for (int v = 0; v < NV; ++v) {
            const vf delta = load(deltas + v * W), log_total = load(log_totals + v * W);
            const float* bias = biases.row(task.head, key) + q + v * W;
            float* diagonal = diagonals + (q + v * W) - key + n - 1;
            const int mine = static_cast<int>(count - v * W < W ? count - v * W : W);
            const auto gradient = [&](int64_t j) LAMBDA {
              if (j >= rows) return vf{};
              vf x = load(score + j * kColumns + v * W) * scale;
              if (biased) x += load(bias - j);
              const vf p = exp2_coarse((x - log_total) * kLog2E);
              const vf ds = p * (drops[v](load(dprob + j * kColumns + v * W), key + j) - delta);
              store(probs + (r + j) * kBlock + v * W, drops[v](p, key + j));
              store(dscores + (r + j) * kBlock + v * W, ds);
              if (rel_bias) store(diagonal - j, load(diagonal - j) + first(ds, mine));
              return ds;
            };
            for (int64_t j = 0; j < rows; j += 2) {
              const vf low = gradient(j), high = gradient(j + 1);
              store_pairs(dscore_pairs + (r + j) / 2 * kPair + 2 * W * v, low, high);
            }
          }
        }
        for (int64_t d = 0; d < K; d += kColumns) {
          const int wanted = K - d > W ? 2 : 1;
          float *dk = dkeys + seen.first * ldk + d, *dv = dvalues + seen.first * ldk + d;
          multiply(wanted, seen.size(), count, probs, kBlock, dout_rows + d * kBlock, dv, ldk, dv, ldk);
          multiply(wanted, seen.size(), count, dscores, kBlock, query_rows + d * kBlock, dk, ldk, dk, ldk);
        }
        multiply(NV, K, seen.size(), keys + seen.first, longest, dscore_pairs, nullptr, 0, dqueries, kColumns);
        const vf scales[2] = {splat(scale), splat(scale)};
        store_transposed(dqueries, scales, count, K, dbase + q * step, step);
      }
      for (int64_t j = 0; j < n; ++j)
        each_vector(K, [&](int64_t d, int lanes) LAMBDA {
          store(dbase + j * step + H * K + d, load(dkeys + j * ldk + d) * scale, lanes);
          store(dbase + j * step + 2 * H * K + d, load(dvalues + j * ldk + d), lanes);
        });
      float* of_task = sums.get() + (task.begin * H + task.head * n) * 2;
      for (int64_t o = 0; rel_bias && o < 2 * n - 1; ++o) of_task[o] = diagonals[2 * n - 2 - o];
    }
    if (rel_bias) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < H; ++head)
        add_diagonals(sums.get(), cu_seqlens, S, H, head, num_offsets, drel_bias);
    }
  }
}

}  // namespace
#endif

template <class T>
void add_attention_pairs(Kernels<T>&) {}
#if defined(__AVX512BF16__) && !defined(FASTBERT_AMX)
template <>
void add_attention_pairs(Kernels<bf16>& table) {
  table.attention_fwd = attention_pairs_fwd;
  table.attention_bwd = attention_pairs_bwd;
}
#endif
template void add_attention_pairs(Kernels<float>&);
template void add_attention_pairs(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
