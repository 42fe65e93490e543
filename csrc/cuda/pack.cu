// The packing plan on the device, and rows between padded and packed. The host waits for nothing, reads nothing.
#include "cuda/kernels.h"
#include "cuda/simt.h"

namespace fastbert::cuda {
namespace {

using std::int32_t;
using std::int64_t;

constexpr int SCAN = 256, ROWS = 256, WARP = 32;

// One block: an inclusive scan of S lengths, SCAN at a time. 4 bytes read and 4 written a sequence. May run in place.
__global__ void __launch_bounds__(SCAN) scan_kernel(const int32_t* lengths, int32_t* cu_seqlens, int64_t S) {
  int* totals = reinterpret_cast<int*>(shared_memory());
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int before = 0;
  if (threadIdx.x == 0) cu_seqlens[0] = 0;
  for (int64_t first = 0; first < S; first += SCAN) {
    const int64_t s = first + threadIdx.x;
    int sum = s < S && lengths[s] > 0 ? lengths[s] : 0;
    for (int delta = 1; delta < WARP; delta *= 2) {
      const int other = shuffle_up(sum, delta);
      if (lane >= delta) sum += other;
    }
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
    for (int w = 0; w < SCAN / WARP; ++w) {
      if (w == warp) sum += before;
      before += totals[w];
    }
    __syncthreads();  // totals is read, and (in place) lengths too, before either is written again
    if (s < S) cu_seqlens[s + 1] = sum;
  }
}

// One warp a row of the mask: its length.
__global__ void __launch_bounds__(ROWS) count_kernel(const std::uint8_t* mask, int32_t* lengths, int64_t S, int64_t L) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (ROWS / WARP) + threadIdx.x / WARP;
  if (row >= S) return;
  int count = 0;
  for (int64_t first = 0; first < L; first += WARP) {
    const int64_t column = first + threadIdx.x % WARP;
    count += count_bits(ballot(column < L && mask[row * L + column] != 0));
  }
  if (threadIdx.x % WARP == 0) lengths[row] = count;
}

// One warp a row of the mask: where its kept tokens lie in (S * L), in order.
__global__ void __launch_bounds__(ROWS)
    indices_kernel(const std::uint8_t* mask, const int32_t* cu_seqlens, int64_t* indices, int64_t S, int64_t L) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (ROWS / WARP) + threadIdx.x / WARP;
  if (row >= S) return;
  const int lane = threadIdx.x % WARP;
  int64_t at = cu_seqlens[row];
  for (int64_t first = 0; first < L; first += WARP) {
    const int64_t column = first + lane;
    const bool kept = column < L && mask[row * L + column] != 0;
    const unsigned all = ballot(kept);
    if (kept) indices[at + count_bits(all & ((1u << lane) - 1))] = row * L + column;
    at += count_bits(all);
  }
}

// indices past the last kept token: -1, a row that `gather` and `scatter` pass over.
__global__ void __launch_bounds__(ROWS)
    tail_kernel(const int32_t* cu_seqlens, int64_t* indices, int64_t S, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x;
  if (i < size && i >= cu_seqlens[S]) indices[i] = -1;
}

// One thread a token: a binary search for its sequence. 16 bytes written a token; cu_seqlens comes from cache.
__global__ void __launch_bounds__(ROWS) tokens_kernel(const int32_t* cu_seqlens, int64_t* positions, int32_t* low,
                                                      int32_t* high, int64_t S, int64_t capacity) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x;
  if (token >= capacity) return;
  if (token >= cu_seqlens[S]) {
    positions[token] = low[token] = high[token] = 0;
    return;
  }
  int64_t left = 0, right = S;  // cu_seqlens[left] <= token < cu_seqlens[right]
  while (right - left > 1) {
    const int64_t middle = (left + right) / 2;
    (cu_seqlens[middle] <= token ? left : right) = middle;
  }
  positions[token] = token - cu_seqlens[left];
  low[token] = cu_seqlens[left];
  high[token] = cu_seqlens[right];
}

// One thread a word of a row, so that neighbours move neighbouring words. A row is read once and written once.
template <class Word, bool SCATTER>
__global__ void __launch_bounds__(ROWS)
    rows_kernel(const Word* x, const int64_t* indices, Word* out, int64_t count, int64_t num_rows, int64_t words) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * ROWS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x; i < count * words; i += stride) {
    const int64_t row = i / words, word = i % words, other = indices[row];
    const bool inside = other >= 0 && other < num_rows;
    if (SCATTER) {
      if (inside) out[other * words + word] = x[i];
    } else {
      out[i] = inside ? x[other * words + word] : Word{};
    }
  }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + ROWS - 1) / ROWS); }

template <class Word, bool SCATTER>
const char* move_rows(const void* x, const int64_t* indices, void* out, int64_t count, int64_t num_rows, int64_t nbytes,
                      void* stream) {
  const int64_t words = nbytes / static_cast<int64_t>(sizeof(Word)), most = int64_t{1} << 20;
  if (count * words == 0) return nullptr;
  const int64_t threads = count * words < most * ROWS ? count * words : most * ROWS;
  return launch(rows_kernel<Word, SCATTER>, blocks_for(threads), ROWS, 0, stream, static_cast<const Word*>(x), indices,
                static_cast<Word*>(out), count, num_rows, words);
}

template <bool SCATTER>
const char* move_rows(const void* x, const int64_t* indices, void* out, int64_t count, int64_t num_rows, int64_t nbytes,
                      int word, void* stream) {
  if (word == 16) return move_rows<uint4, SCATTER>(x, indices, out, count, num_rows, nbytes, stream);
  if (word == 4) return move_rows<std::uint32_t, SCATTER>(x, indices, out, count, num_rows, nbytes, stream);
  return move_rows<std::uint8_t, SCATTER>(x, indices, out, count, num_rows, nbytes, stream);
}

}  // namespace

const char* select_device(int device) { return set_device(device); }

const char* plan_lengths(const int32_t* lengths, int32_t* cu_seqlens, int64_t S, void* stream) {
  return launch(scan_kernel, 1, SCAN, SCAN / WARP * sizeof(int), stream, lengths, cu_seqlens, S);
}

const char* plan_mask(const std::uint8_t* mask, int32_t* cu_seqlens, int64_t* indices, int64_t S, int64_t L,
                      void* stream) {
  const unsigned blocks = blocks_for(S * WARP);
  const char* error = nullptr;
  if (blocks) error = launch(count_kernel, blocks, ROWS, 0, stream, mask, cu_seqlens + 1, S, L);
  if (!error) error = plan_lengths(cu_seqlens + 1, cu_seqlens, S, stream);
  if (!error && blocks) error = launch(indices_kernel, blocks, ROWS, 0, stream, mask, cu_seqlens, indices, S, L);
  if (!error && S * L > 0)
    error = launch(tail_kernel, blocks_for(S * L), ROWS, 0, stream, cu_seqlens, indices, S, S * L);
  return error;
}

const char* plan_tokens(const int32_t* cu_seqlens, int64_t* positions, int32_t* low, int32_t* high, int64_t S,
                        int64_t capacity, void* stream) {
  if (capacity == 0) return nullptr;
  return launch(tokens_kernel, blocks_for(capacity), ROWS, 0, stream, cu_seqlens, positions, low, high, S, capacity);
}

const char* gather(const void* x, const int64_t* indices, void* out, int64_t count, int64_t num_rows, int64_t nbytes,
                   int word, void* stream) {
  return move_rows<false>(x, indices, out, count, num_rows, nbytes, word, stream);
}

const char* scatter(const void* x, const int64_t* indices, void* out, int64_t count, int64_t num_rows, int64_t nbytes,
                    int word, void* stream) {
  return move_rows<true>(x, indices, out, count, num_rows, nbytes, word, stream);
}

}  // namespace fastbert::cuda
