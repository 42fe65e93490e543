// The densest arithmetic of an instruction set, out of registers alone: the roof that kernels are held against.
#include "cpu/amx.h"
#include "cpu/gemm_int8.h"
#include "cpu/table.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// The compiler may assume nothing about x here: neither that it is still what it was, nor that nobody needs it.
#if defined(__AVX512F__)
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__x86_64__)
#define OPAQUE(x) __asm__ volatile("" : "+x"(x))
#elif defined(__aarch64__)
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#else
#define OPAQUE(x) __asm__ volatile("" : "+m"(x))
#endif

// Two instructions a cycle of up to six cycles each wait for nobody, and 16 registers hold them.
constexpr int kSums = 12;

template <class V, class Step>
INLINE void chains(int64_t rounds, Step step) {
  V sums[kSums] = {}, a{}, b{};
  OPAQUE(b);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
      OPAQUE(a);
      sums[i] = step(sums[i], a, b);
      OPAQUE(sums[i]);
    }
}

// Rounds of kSums instructions on each thread; operations (a product and its sum are two) of all threads together.
template <class V, class Step>
double on_all_threads(int64_t rounds, double operations, Step step) {
  double total = 0.0;
#pragma omp parallel reduction(+ : total)
  {
    chains<V>(rounds, step);
    total += kSums * operations * static_cast<double>(rounds);
  }
  return total;
}

double peak_float(int64_t rounds) {
  return on_all_threads<vf>(rounds, 2.0 * W, [](vf sums, vf a, vf b) LAMBDA { return sums + a * b; });
}

#if defined(FASTBERT_AMX) && !defined(FASTBERT_EMULATE_AMX)
// Four tiles of sums are enough: a product takes 16 cycles and is done after 52. All are zero, nothing is loaded.
template <bool kBytes>
double tiles_on_all_threads(int64_t rounds) {
  double total = 0.0;
#pragma omp parallel reduction(+ : total)
  {
    const Tiles tiles;  // loading a configuration clears them
    for (int64_t i = 0; i < rounds; ++i)
      if constexpr (kBytes) {
        TILE_DOT_BYTES(0, 4, 5);
        TILE_DOT_BYTES(1, 4, 5);
        TILE_DOT_BYTES(2, 4, 5);
        TILE_DOT_BYTES(3, 4, 5);
      } else {
        TILE_DOT_BF16(0, 4, 5);
        TILE_DOT_BF16(1, 4, 5);
        TILE_DOT_BF16(2, 4, 5);
        TILE_DOT_BF16(3, 4, 5);
      }
    const double depth = kTileBytes / (kBytes ? 1 : 2);
    total += 4 * 2.0 * kTileHeight * kTileHeight * depth * static_cast<double>(rounds);
  }
  return total;
}

double peak_bf16(int64_t rounds) { return tiles_on_all_threads<false>(rounds); }
double peak_int8(int64_t rounds) { return tiles_on_all_threads<true>(rounds); }
#else
double peak_bf16(int64_t rounds) {
#if defined(__AVX512BF16__)
  return on_all_threads<vf>(rounds, 4.0 * W, [](vf sums, vf a, vf b) LAMBDA {
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
  });
#else
  return peak_float(rounds);  // what has no arithmetic of its own is computed in fp32
#endif
}

double peak_int8(int64_t rounds) {
  if constexpr (kFours)
    return on_all_threads<vi>(rounds, 8.0 * W, [](vi sums, vi a, vi b) LAMBDA { return dot_fours(sums, a, b); });
  else
    return on_all_threads<vi>(rounds, 4.0 * W, [](vi sums, vi a, vi b) LAMBDA { return dot_pairs(sums, a, b); });
}
#endif

}  // namespace

Peaks peak_table() { return {peak_float, peak_bf16, peak_int8}; }

}  // namespace fastbert::FASTBERT_ISA
