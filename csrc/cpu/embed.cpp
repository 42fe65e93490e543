// y = dropout(LN(word + token_type + position)): rows are gathered from the tables, in backward once more.
#include <omp.h>

#include "cpu/layer_norm.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// The three rows of one token; type is null without segments.
template <class T>
struct Gather {
  const T *word, *type, *position;
  INLINE vf operator()(int64_t i, int n) const {
    const vf z = load(word + i, n);
    return (type ? z + load(type + i, n) : z) + load(position + i, n);
  }
};

template <class T>
void embed_fwd(const int64_t* input_ids, const int64_t* position_ids, const int64_t* type_ids, const T* word,
               const T* position, const T* token_type, const float* weight, const float* bias, T* y, float* mean,
               float* rstd, int64_t rows, int64_t D, float eps, Dropout dropout) {
#pragma omp parallel if (rows * D > kParallelWork)
  {
    const Scratch z(D);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const RowDropout drop(dropout, row);
      const Gather<T> gather{word + input_ids[row] * D, type_ids ? token_type + type_ids[row] * D : nullptr,
                             position + position_ids[row] * D};
      each_vector(D, [&](int64_t i, int n) LAMBDA { store(z.get() + i, gather(i, n), n); });
      const RowStats stats = row_stats(z.get(), D, eps);
      mean[row] = stats.mean;
      rstd[row] = stats.rstd;
      each_vector(D, [&](int64_t i, int n) LAMBDA {
        const vf value = normalised(load(z.get() + i, n), stats) * load(weight + i, n) + load(bias + i, n);
        store(y + row * D + i, drop(value, i), n);
      });
    }
  }
}

// table[ids[row]] += dz[row] for all rows. Threads share out the columns, so every sum runs in the order of the tokens.
void scatter_add(const int64_t* ids, const float* dz, float* table, int64_t rows, int64_t D, int64_t skip) {
  // As wide as the threads allow: each pass over the tokens touches the pages of the table again.
  const int64_t share = round_up((D + omp_get_max_threads() - 1) / omp_get_max_threads(), 16);
#pragma omp parallel for schedule(static) if (rows * D > kParallelWork)
  for (int64_t column = 0; column < D; column += share) {
    const int64_t width = D - column < share ? D - column : share;
    for (int64_t row = 0; row < rows; ++row) {
      if (ids[row] == skip) continue;
      float* to = table + ids[row] * D + column;
      const float* from = dz + row * D + column;
      each_vector(width, [&](int64_t i, int n) LAMBDA { store(to + i, load(to + i, n) + load(from + i, n), n); });
    }
  }
}

template <class T>
void embed_bwd(const T* dy, const int64_t* input_ids, const int64_t* position_ids, const int64_t* type_ids,
               const T* word, const T* position, const T* token_type, const float* weight, const float* mean,
               const float* rstd, float* dword, float* dposition, float* dtoken_type, float* dweight, float* dbias,
               int64_t rows, int64_t D, int64_t padding_idx, Dropout dropout) {
  ParameterSums sums(rows, D);
  const Scratch dz(rows * D);
#pragma omp parallel if (rows * D > kParallelWork)
  {
    const Scratch scratch(2 * D);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < sums.chunks.count; ++chunk) {
      sums.clear(chunk);
      for (int64_t row = sums.chunks.begin(chunk); row < sums.chunks.end(chunk); ++row) {
        const RowDropout drop(dropout, row);
        const Gather<T> gather{word + input_ids[row] * D, type_ids ? token_type + type_ids[row] * D : nullptr,
                               position + position_ids[row] * D};
        row_bwd(
            D, {mean[row], rstd[row]}, weight, scratch.get(), scratch.get() + D, sums.dweight(chunk),
            sums.dbias(chunk), [&](int64_t i, int n) LAMBDA { return drop(load(dy + row * D + i, n), i); }, gather,
            [&](int64_t i, vf value, int n) LAMBDA { store(dz.get() + row * D + i, value, n); });
      }
    }
  }
  sums.finish(dweight, dbias);
  constexpr int64_t kNone = -1;
  scatter_add(input_ids, dz.get(), dword, rows, D, padding_idx);
  scatter_add(position_ids, dz.get(), dposition, rows, D, kNone);
  if (type_ids) scatter_add(type_ids, dz.get(), dtoken_type, rows, D, kNone);
}

}  // namespace

template <class T>
void add_embed(Kernels<T>& table) {
  table.embed_fwd = embed_fwd;
  table.embed_bwd = embed_bwd;
}
template void add_embed(Kernels<float>&);
template void add_embed(Kernels<bf16>&);

}  // namespace fastbert::FASTBERT_ISA
