// A GPU for tests: every thread of a block is a fiber, run in turn by one OS thread; blocks run one after the other.
// A barrier yields until its block or warp has arrived; a round in which nobody moved is a deadlock and aborts. Shared
// memory starts as NaN, asynchronous copies land only at `async_wait`, tensor-core fragments lie as PTX says.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace fastbert {
namespace simt {

constexpr size_t STACK = 64 * 1024;
constexpr int MAX_THREADS = 1024, WARP = 32;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
struct Copy {
  void* to;
  const void* from;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  std::vector<Copy> copies;
  bool done = false;
};
struct Warp {
  Barrier barrier;
  unsigned words[WARP][8];  // what each lane shows to the others
  const void* rows[WARP];
};

inline std::vector<Fiber> fibers(MAX_THREADS);
inline Warp warps[MAX_THREADS / WARP];
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool moved;
inline std::vector<char> memory;

inline void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

inline void arrive(Barrier& barrier, int count) {
  const unsigned generation = barrier.generation;
  moved = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
  moved = true;
}

inline Warp& warp() { return warps[threadIdx.x / WARP]; }
inline int lane() { return threadIdx.x % WARP; }
inline void sync_warp() { arrive(warp().barrier, std::min<int>(WARP, blockDim.x - threadIdx.x / WARP * WARP)); }

// Shows `mine` to the warp, reads with `read`, and lets nobody go on before all have read.
template <class Read>
auto exchange(const unsigned* mine, int count, Read read) {
  std::copy_n(mine, count, warp().words[lane()]);
  sync_warp();
  auto result = read(warp());
  sync_warp();
  return result;
}

inline void enter() {
  body();
  fibers[threadIdx.x].done = true;
  moved = true;
  yield();
}

inline void run_block(int threads) {
  block_barrier = Barrier();
  std::fill_n(warps, MAX_THREADS / WARP, Warp());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left > 0;) {
    moved = false;
    left = threads;
    for (int i = 0; i < threads; ++i) {
      threadIdx.x = static_cast<unsigned>(i);
      if (!fibers[i].done) swapcontext(&scheduler, &fibers[i].context);
      left -= fibers[i].done;
    }
    if (!moved) {
      std::fprintf(stderr, "cuda_on_cpu: threads of block %u wait for each other for ever\n", blockIdx.x);
      std::abort();
    }
  }
}

inline float bits_to_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned float_to_bits(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}

}  // namespace simt

inline char* shared_memory() { return simt::memory.data(); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return simt::bits_to_float(static_cast<unsigned>(x.bits) << 16); }
inline float to_float(fp16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
}
template <class T>
T round_to(float x);
template <>
inline bf16 round_to<bf16>(float x) {
  const unsigned bits = simt::float_to_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline fp16 round_to<fp16>(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  fp16 z;
  std::memcpy(&z, &y, 2);
  return z;
}
template <class T>
unsigned pack2(float low, float high) {
  return round_to<T>(low).bits | static_cast<unsigned>(round_to<T>(high).bits) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline int count_bits(unsigned x) { return __builtin_popcount(x); }
inline void __syncthreads() { simt::arrive(simt::block_barrier, blockDim.x); }

inline float shuffle_xor(float x, int mask) {
  const unsigned mine = simt::float_to_bits(x);
  return simt::exchange(&mine, 1, [&](simt::Warp& w) { return simt::bits_to_float(w.words[simt::lane() ^ mask][0]); });
}
inline int shuffle_up(int x, int delta) {
  const unsigned mine = static_cast<unsigned>(x);
  const int from = simt::lane() < delta ? simt::lane() : simt::lane() - delta;
  return simt::exchange(&mine, 1, [&](simt::Warp& w) { return static_cast<int>(w.words[from][0]); });
}
inline unsigned ballot(bool x) {
  const unsigned mine = x;
  return simt::exchange(&mine, 1, [](simt::Warp& w) {
    unsigned y = 0;
    for (int i = 0; i < simt::WARP; ++i) y |= w.words[i][0] << i;
    return y;
  });
}

inline void async_copy16(void* shared, const void* global) {
  simt::fibers[threadIdx.x].copies.push_back({shared, global});
}
inline void async_wait() {
  for (const simt::Copy& c : simt::fibers[threadIdx.x].copies) std::memcpy(c.to, c.from, 16);
  simt::fibers[threadIdx.x].copies.clear();
}

// Lane l of matrix m holds elements 2 (l % 4) and + 1 of row l / 4; transposed: of column l / 4.
inline void load_matrices(unsigned (&y)[4], const void* row, bool transposed) {
  simt::warp().rows[simt::lane()] = row;
  simt::sync_warp();
  for (int m = 0; m < 4; ++m)
    for (int half = 0; half < 2; ++half) {
      const int i = simt::lane() / 4, j = simt::lane() % 4 * 2 + half;
      std::uint16_t element;
      const void* from = simt::warp().rows[8 * m + (transposed ? j : i)];
      std::memcpy(&element, static_cast<const char*>(from) + 2 * (transposed ? i : j), 2);
      y[m] = half ? y[m] | static_cast<unsigned>(element) << 16 : element;
    }
  simt::sync_warp();
}
inline void ldmatrix(unsigned (&y)[4], const void* row) { load_matrices(y, row, false); }
inline void ldmatrix_transposed(unsigned (&y)[4], const void* row) { load_matrices(y, row, true); }

// Element (i, k) of a: lane 4 (i % 8) + k % 8 / 2, register i / 8 + 2 (k / 8); (k, j) of b: lane 4 j + k % 8 / 2,
// register k / 8; c[r] of a lane: row lane / 4 + 8 (r / 2), column 2 (lane % 4) + r % 2.
template <class T>
void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned mine[] = {a[0], a[1], a[2], a[3], b0, b1};
  simt::exchange(mine, 6, [&](simt::Warp& w) {
    for (int r = 0; r < 4; ++r) {
      const int i = simt::lane() / 4 + 8 * (r / 2), j = simt::lane() % 4 * 2 + r % 2;
      for (int k = 0; k < 16; ++k) {
        const unsigned x = w.words[4 * (i % 8) + k % 8 / 2][i / 8 + 2 * (k / 8)];
        const unsigned y = w.words[4 * j + k % 8 / 2][4 + k / 8];
        const int shift = k % 2 * 16;
        const T left{static_cast<std::uint16_t>(x >> shift)}, right{static_cast<std::uint16_t>(y >> shift)};
        c[r] += to_float(left) * to_float(right);
      }
    }
    return 0;
  });
}

inline const char* set_device(int) { return nullptr; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), unsigned blocks, int threads, int shared_bytes, void*,
                   Arguments... arguments) {
  if (threads > simt::MAX_THREADS || shared_bytes > 163 * 1024) return "too many threads or too much shared memory";
  simt::body = [=] { kernel(arguments...); };
  gridDim.x = blocks;
  blockDim.x = static_cast<unsigned>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    simt::memory.assign(static_cast<size_t>(shared_bytes), static_cast<char>(0xff));
    simt::run_block(threads);
  }
  return nullptr;
}

}  // namespace fastbert
