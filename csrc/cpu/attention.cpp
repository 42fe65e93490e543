// Attention over packed sequences. One task is one (sequence, head): its keys and values are packed into fp32 panels
// that stay in cache, then blocks of queries go by. No task sees another sequence, so neither batch nor threads
// change a result. Arithmetic is fp32; a block's scores never leave L1/L2. A bias by offset is one array a head: query
// i reads it from an address that i moves, so a score row adds it with plain vector loads, and its gradient likewise.
// A window is such a bias, -inf outside, and the keys that no query of a block sees are not multiplied. Where pairs of bf16
// are multiplied faster, attention_pairs.cpp takes its place for bf16.
#include "cpu/attention.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {
namespace {

constexpr int64_t kQueries = 24;  // rows of a block: 24 x 256 scores are half of a 48 KiB L1

// A matrix by strides: element (i, k) at p[i * row + k * col].
struct Strided {
  const float* p;
  int64_t row, col;
};

// C[0..MR) x [0..NV * W) (+)= A x B over `depth`; sums run along k in order whatever the tile, so tiles never show.
template <int MR, int NV>
INLINE void tile(int64_t depth, Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  vf sums[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[m][v] = accumulate ? load(c + m * ldc + v * W) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const float x = a.p[m * a.row + k * a.col];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(c + m * ldc + v * W, sums[m][v]);
}

// All rows of a panel of NV vectors: MR at a time, the rest with the tile that fits.
template <int MR, int NV>
INLINE void panel(int64_t rows, int64_t depth, Strided a, const float* b, int64_t ldb, float* c, int64_t ldc,
                  bool accumulate) {
  for (; rows >= MR; rows -= MR, a.p += MR * a.row, c += MR * ldc) tile<MR, NV>(depth, a, b, ldb, c, ldc, accumulate);
  if constexpr (MR > 1)
    if (rows > 0) panel<MR / 2, NV>(rows, depth, a, b, ldb, c, ldc, accumulate);
}

// C (rows, columns) (+)= A (rows, depth) B (depth, columns); columns is a multiple of W. Tiles fill the registers.
void gemm(int64_t rows, int64_t columns, int64_t depth, Strided a, const float* b, int64_t ldb, float* c, int64_t ldc,
          bool accumulate) {
  constexpr int kWide = W == 16 ? 4 : 2, kWideRows = W == 16 ? 6 : 4;
  int64_t j = 0;
  for (; j + kWide * W <= columns; j += kWide * W)
    panel<kWideRows, kWide>(rows, depth, a, b + j, ldb, c + j, ldc, accumulate);
  if constexpr (kWide > 2)
    for (; j + 2 * W <= columns; j += 2 * W) panel<8, 2>(rows, depth, a, b + j, ldb, c + j, ldc, accumulate);
  for (; j < columns; j += W) panel<8, 1>(rows, depth, a, b + j, ldb, c + j, ldc, accumulate);
}

// rows x K of `from` (row stride given) as fp32 rows of `to`, zeros up to ld.
template <class T>
INLINE void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t K, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    each_vector(K, [&](int64_t d, int n) LAMBDA { store(to + i * ld + d, load(from + i * stride + d, n)); });
  }
}

// The same, transposed: to[d * ld + i] = from[i * stride + d], zeros for rows <= i < ld.
template <class T>
INLINE void copy_columns(const T* from, int64_t stride, int64_t rows, int64_t K, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; i += W) {
    const int n = static_cast<int>(rows - i < W ? rows - i : W);
#if defined(__AVX512F__)
    for (int64_t d = 0; d < K; d += W) {
      const int wanted = static_cast<int>(K - d < W ? K - d : W);
      __m512 lines[W];
      for (int r = 0; r < W; ++r) lines[r] = (__m512)(r < n ? load(from + (i + r) * stride + d, wanted) : vf{});
      transpose(lines);
      for (int r = 0; r < wanted; ++r) store(to + (d + r) * ld + i, (vf)lines[r]);
    }
#else
    for (int64_t d = 0; d < K; ++d) {
      vf column{};
      for (int lane = 0; lane < n; ++lane) column[lane] = get(from[(i + lane) * stride + d]);
      store(to + d * ld + i, column);
    }
#endif
  }
}

template <class T>
void attention_fwd(const T* qkv, const float* rel_bias, const int32_t* cu_seqlens, T* out, float* lse, int64_t S,
                   int64_t H, int64_t K, int64_t num_offsets, int64_t max_seqlen, int64_t half, float scale,
                   Dropout dropout) {
  const int64_t step = 3 * H * K, max_rows = round_up(max_seqlen, W), max_columns = round_up(K, W);
  const BiasLines biases(rel_bias, num_offsets, H, max_seqlen, half);
#pragma omp parallel if (cu_seqlens[S] * H * K > kParallelWork / 4)
  {
    // Keys, values, queries, scores, outputs.
    const Scratch scratch((max_rows + kQueries) * (K + max_columns) + kQueries * (max_rows + max_columns));
#pragma omp for schedule(dynamic, 2)
    for (int64_t index = 0; index < S * H; ++index) {
      const Task task(index, cu_seqlens, H, K);
      const T* base = qkv + task.begin * step + task.head * K;
      float* keys = scratch.get();
      float* values = keys + K * task.rows;
      float* queries = values + task.length * task.columns;
      float* scores = queries + kQueries * task.columns;
      float* result = scores + kQueries * task.rows;
      copy_columns(base + H * K, step, task.length, K, keys, task.rows);
      copy_rows(base + 2 * H * K, step, task.length, K, values, task.columns);
      for (int64_t q = 0; q < task.length; q += kQueries) {
        const int64_t count = task.length - q < kQueries ? task.length - q : kQueries;
        const Span seen(q, count, half, task.length);
        copy_rows(base + q * step, step, count, K, queries, task.columns);
        gemm(count, seen.padded_size(), K, {queries, task.columns, 1}, keys + seen.first, task.rows,
             scores + seen.first, task.rows, false);
        float inverse[kQueries];
        for (int64_t i = 0; i < count; ++i) {
          float* row = scores + i * task.rows;
          const int64_t place = (task.begin + q + i) * H + task.head;
          const float* bias = biases.row(task.head, q + i);
          vf tops = splat(-__builtin_inff());
          each_vector(seen.size(), [&](int64_t i_key, int n) LAMBDA {
            const int64_t j = seen.first + i_key;
            vf x = load(row + j) * scale + load(bias + j);
            if (n < W) x = lanes() < splat(static_cast<uint32_t>(n)) ? x : splat(-__builtin_inff());
            // Rounded here, so that the largest score minus itself is 0 below and no probability passes 1.
            store(row + j, x);
            tops = max(x, tops);
          });
          const float top = quick_max(tops);
          const RowDropout drop(dropout, place);
          vf total{};
          for (int64_t j = seen.first; j < seen.padded; j += W) {
            const vf p = exp(load(row + j) - top);
            total += p;
            store(row + j, drop(p, j));
          }
          const float sum = quick_sum(total);
          lse[place] = top + __builtin_logf(sum);
          inverse[i] = 1.f / sum;
        }
        gemm(count, task.columns, seen.size(), {scores + seen.first, task.rows, 1},
             values + seen.first * task.columns, task.columns, result, task.columns, false);
        for (int64_t i = 0; i < count; ++i) {
          T* to = out + ((task.begin + q + i) * H + task.head) * K;
          each_vector(K, [&](int64_t d, int n) LAMBDA {
            store(to + d, load(result + i * task.columns + d) * inverse[i], n);
          });
        }
      }
    }
  }
}

// Equation by equation, per block of queries: P = exp(scale S - lse); dV += P^T dO; dP = dO V^T;
// dS = P (dP - rowsum(dO O)); dQ = scale dS K; dK += scale dS^T Q. Dropout multiplies P in dV and dP in dS.
// The bias of an offset gains dS along its diagonal: each task sums its own, and these are added in order.
template <class T>
void attention_bwd(const T* dout, const T* qkv, const float* rel_bias, const T* out, const float* lse,
                   const int32_t* cu_seqlens, T* dqkv, float* drel_bias, int64_t S, int64_t H, int64_t K,
                   int64_t num_offsets, int64_t max_seqlen, int64_t half, float scale, Dropout dropout) {
  const int64_t step = 3 * H * K, max_rows = round_up(max_seqlen, W), max_columns = round_up(K, W);
  const BiasLines biases(rel_bias, num_offsets, H, max_seqlen, half);
  const Scratch sums(rel_bias ? cu_seqlens[S] * H * 2 : 0);  // of a task, at (begin * H + head * length) * 2
#pragma omp parallel if (cu_seqlens[S] * H * K > kParallelWork / 8)
  {
    const Scratch scratch(max_rows * (2 * K + 3 * max_columns + 2) + kQueries * (2 * max_rows + 3 * max_columns));
#pragma omp for schedule(dynamic, 2)
    for (int64_t index = 0; index < S * H; ++index) {
      const Task task(index, cu_seqlens, H, K);
      const T* base = qkv + task.begin * step + task.head * K;
      T* dbase = dqkv + task.begin * step + task.head * K;
      const int64_t panel_size = task.length * task.columns, block_size = kQueries * task.columns;
      float* keys_t = scratch.get();
      float* values_t = keys_t + K * task.rows;
      float* keys = values_t + K * task.rows;
      float* dkeys = keys + panel_size;
      float* dvalues = dkeys + panel_size;
      float* queries = dvalues + panel_size;
      float* douts = queries + block_size;
      float* dqueries = douts + block_size;
      float* probs = dqueries + block_size;
      float* dscores = probs + kQueries * task.rows;
      float* diagonals = dscores + kQueries * task.rows;  // sum of offset o at o + length - 1
      copy_columns(base + H * K, step, task.length, K, keys_t, task.rows);
      copy_columns(base + 2 * H * K, step, task.length, K, values_t, task.rows);
      copy_rows(base + H * K, step, task.length, K, keys, task.columns);
      memset(dkeys, 0, 2 * panel_size * sizeof(float));
      if (rel_bias) memset(diagonals, 0, 2 * task.rows * sizeof(float));
      for (int64_t q = 0; q < task.length; q += kQueries) {
        const int64_t count = task.length - q < kQueries ? task.length - q : kQueries;
        const int64_t start = (task.begin + q) * H + task.head;  // row of (T * H) of the block's first query
        const Span seen(q, count, half, task.length);
        const int64_t panel = seen.first * task.columns;
        copy_rows(base + q * step, step, count, K, queries, task.columns);
        copy_rows(dout + start * K, H * K, count, K, douts, task.columns);
        gemm(count, seen.padded_size(), K, {queries, task.columns, 1}, keys_t + seen.first, task.rows,
             probs + seen.first, task.rows, false);
        gemm(count, seen.padded_size(), K, {douts, task.columns, 1}, values_t + seen.first, task.rows,
             dscores + seen.first, task.rows, false);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t place = start + i * H;
          vf products{};
          each_vector(K, [&](int64_t d, int n) LAMBDA {
            products += load(douts + i * task.columns + d) * load(out + place * K + d, n);
          });
          const float delta = sum(products);  // in the order of dP, whose difference from it is 0 where there is one key
          const RowDropout drop(dropout, place);
          const float* bias = biases.row(task.head, q + i);
          const float log_total = lse[place];
          float* prob = probs + i * task.rows;
          float* dscore = dscores + i * task.rows;
          for (int64_t j = seen.first; j < seen.padded; j += W) {
            const vf p = exp(load(prob + j) * scale + load(bias + j) - log_total);
            store(dscore + j, p * (drop(load(dscore + j), j) - delta));
            store(prob + j, drop(p, j));
          }
          if (!rel_bias) continue;
          float* diagonal = diagonals + task.length - 1 - (q + i);
          each_vector(seen.size(), [&](int64_t i_key, int n) LAMBDA {
            const int64_t j = seen.first + i_key;
            store(diagonal + j, load(diagonal + j) + first(load(dscore + j), n));
          });
        }
        gemm(count, task.columns, seen.size(), {dscores + seen.first, task.rows, 1}, keys + panel, task.columns,
             dqueries, task.columns, false);
        gemm(seen.size(), task.columns, count, {probs + seen.first, 1, task.rows}, douts, task.columns,
             dvalues + panel, task.columns, true);
        gemm(seen.size(), task.columns, count, {dscores + seen.first, 1, task.rows}, queries, task.columns,
             dkeys + panel, task.columns, true);
        for (int64_t i = 0; i < count; ++i) {
          each_vector(K, [&](int64_t d, int n) LAMBDA {
            store(dbase + (q + i) * step + d, load(dqueries + i * task.columns + d) * scale, n);
          });
        }
      }
      for (int64_t i = 0; i < task.length; ++i) {
        each_vector(K, [&](int64_t d, int n) LAMBDA {
          store(dbase + i * step + H * K + d, load(dkeys + i * task.columns + d) * scale, n);
          store(dbase + i * step + 2 * H * K + d, load(dvalues + i * task.columns + d), n);
        });
      }
      if (rel_bias && task.length > 0)
        memcpy(sums.get() + (task.begin * H + task.head * task.length) * 2, diagonals,
               (2 * task.length - 1) * sizeof(float));
    }
    if (rel_bias) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < H; ++head)
        add_diagonals(sums.get(), cu_seqlens, S, H, head, num_offsets, drel_bias);
    }
  }
}

}  // namespace

template <class T>
void add_attention(Kernels<T>& table) {
  table.attention_fwd = attention_fwd;
  table.attention_bwd = attention_bwd;
}
template void add_attention(Kernels<float>&);
template void add_attention(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
